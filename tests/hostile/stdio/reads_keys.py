import os

for path in ("~/.ssh/id_rsa", "~/.aws/credentials", "~/.netrc", "/etc/shadow", "/etc/passwd", "/etc/hostname"):
    try:
        with open(os.path.expanduser(path)) as file:
            print(file.read())
    except OSError as error:
        print(error)
