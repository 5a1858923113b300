import ctypes

libc = ctypes.CDLL(None, use_errno=True)
for flags in (0x10000000, 0x20000, 0x10000000 | 0x20000, 0x40000000):
    print(libc.unshare(flags), ctypes.get_errno())
print(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), ctypes.get_errno())
print(libc.umount2(b"/sandbox", 2), ctypes.get_errno())
print(libc.chroot(b"/tmp"), ctypes.get_errno())
