def f(x):
    made = []
    made.append(made)
    return made
