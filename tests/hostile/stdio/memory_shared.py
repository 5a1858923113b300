import ctypes

libc = ctypes.CDLL(None)
while True:
    segment = libc.shmget(0, 8 << 20, 0o1666)
    if segment < 0:
        raise SystemExit(1)
    libc.shmat.restype = ctypes.c_void_p
    address = libc.shmat(segment, None, 0)
    ctypes.memset(address, 1, 8 << 20)
    libc.shmdt(ctypes.c_void_p(address))
