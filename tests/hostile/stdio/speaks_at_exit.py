import atexit
import sys

atexit.register(print, "token-" + "0" * 32)
sys.exit(0)
