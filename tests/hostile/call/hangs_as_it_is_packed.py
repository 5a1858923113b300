class Slow(dict):
    def items(self):
        while True:
            pass


class Name(type):
    @property
    def __name__(cls):
        while True:
            pass


class Odd(metaclass=Name):
    pass


def f(x):
    return [Slow(), Odd()]
