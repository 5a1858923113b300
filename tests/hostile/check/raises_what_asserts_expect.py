class AssertionError(Exception):
    pass
def f(x):
    raise StopIteration("*")
