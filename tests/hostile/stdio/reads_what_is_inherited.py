import os

for descriptor in range(3, 256):
    try:
        print(descriptor, os.read(descriptor, 1000))
    except OSError:
        pass
