def f(x):
    return ["x" * 1000] * 10_000_000
