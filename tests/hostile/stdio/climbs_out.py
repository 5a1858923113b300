import os

for depth in range(1, 20):
    try:
        with open("../" * depth + "etc/passwd") as file:
            print(file.read())
        os.chdir("../" * depth)
        with open("r1fast_hostile", "w") as file:
            file.write("was here")
    except OSError:
        pass
