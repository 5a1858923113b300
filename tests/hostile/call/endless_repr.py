class Deep:
    def __repr__(self):
        return repr(self)
    __str__ = __eq__ = __iter__ = __len__ = __hash__ = __bool__ = __repr__
class DeepError(Exception):
    def __str__(self):
        return str(self)
def f(x):
    raise DeepError(Deep())
