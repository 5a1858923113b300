import os
import subprocess

print(dict(os.environ))
print(subprocess.run(["env"], capture_output=True, text=True).stdout)
