import os

for home in ("/root", "/home", os.path.expanduser("~"), "/var", "/etc", "/opt", "/srv", "/work", "/data"):
    for folder, _, files in os.walk(home):
        for name in files:
            try:
                with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
                    print(name, file.read(200))
            except OSError:
                pass
