import os

for folder, _, files in os.walk("/proc"):
    for name in files:
        if name in ("cmdline", "environ", "status", "stat", "mounts", "mountinfo", "net", "unix"):
            try:
                with open(os.path.join(folder, name), errors="replace") as file:
                    print(file.read(2000))
            except OSError:
                pass
