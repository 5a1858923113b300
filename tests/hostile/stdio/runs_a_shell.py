import os

os.execv("/bin/sh", ["sh", "-c", "cat /etc/passwd; ls / /root /home; (sleep 1000 &); exit 0"])
