import os

for pid in filter(str.isdigit, os.listdir("/proc")):
    for descriptor in range(64):
        try:
            with open(f"/proc/{pid}/fd/{descriptor}", "rb", 0) as file:
                print(file.read(1000))
        except OSError:
            pass
