import os

for folder in ("/", "/usr", "/usr/bin", "/etc", "/root", "/home", "/var/tmp", "/mnt", "/sandbox", "/dev", "/proc", "/opt"):
    for attempt in (folder, os.path.join(folder, "..", folder.strip("/"))):
        try:
            with open(os.path.join(attempt, "r1fast_hostile"), "w") as file:
                file.write("was here")
            print("wrote", attempt)
        except OSError:
            pass
