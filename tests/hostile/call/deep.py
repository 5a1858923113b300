def f(x):
    made = []
    for _ in range(100_000):
        made = [made]
    return made
