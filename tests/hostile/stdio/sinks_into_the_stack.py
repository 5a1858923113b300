import sys
import threading

sys.setrecursionlimit(10**9)
threading.stack_size(256 << 20)


def sink(x=0):
    return sink(repr(x)) if x else [sink(x)]


thread = threading.Thread(target=sink)
thread.start()
thread.join()
