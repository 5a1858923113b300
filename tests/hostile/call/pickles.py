import os


class Loaded:
    def __reduce__(self):
        return os.system, ("touch /tmp/r1fast_hostile_pickle",)


def f(x):
    return [Loaded(), b"cos\nsystem\n(S'touch /tmp/r1fast_hostile_pickle'\ntR."]
