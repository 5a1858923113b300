import os
import time

if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for descriptor in range(64):
            try:
                os.close(descriptor)
            except OSError:
                pass
        with open("/tmp/r1fast_hostile_daemon", "w") as file:
            file.write("alive")
        time.sleep(10**6)
    os._exit(0)
os.wait()
