import os
import stat

for name, major, minor in (("mem", 1, 1), ("sda", 8, 0), ("kmsg", 1, 11)):
    for folder in ("/tmp", "/dev", "/dev/shm"):
        try:
            path = f"{folder}/r1fast_hostile_{name}"
            os.mknod(path, 0o666 | stat.S_IFBLK, os.makedev(major, minor))
            with open(path, "rb") as file:
                print(file.read(100))
        except OSError:
            pass
    try:
        with open(f"/dev/{name}", "rb") as file:
            print(file.read(100))
    except OSError:
        pass
