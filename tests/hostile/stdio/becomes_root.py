import os

for attempt in (
    lambda: os.setuid(0),
    lambda: os.setgid(0),
    lambda: os.setgroups([0]),
    lambda: os.setresuid(0, 0, 0),
    lambda: os.execv("/usr/bin/su", ["su", "-c", "id"]),
):
    try:
        print(attempt())
    except OSError as error:
        print(error)
