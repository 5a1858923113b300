import os

for target in ("/etc/passwd", "/root", "/proc/1/root/etc/passwd", "/proc/1/environ"):
    os.symlink(target, f"/tmp/r1fast_hostile_{target.replace('/', '_')}")
    try:
        os.link(target, "/tmp/r1fast_hostile_hard")
        with open(f"/tmp/r1fast_hostile_{target.replace('/', '_')}") as file:
            print(file.read())
    except OSError as error:
        print(error)
