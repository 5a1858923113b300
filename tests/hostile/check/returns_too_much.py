def f(x):
    return "token-" * 100_000_000
