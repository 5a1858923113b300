import os

while True:
    descriptor = os.memfd_create("r1fast_hostile")
    os.write(descriptor, b"x" * (8 << 20))
