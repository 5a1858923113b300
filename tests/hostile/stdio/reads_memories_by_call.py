import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(4096)


class Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


here, there = Vector(ctypes.addressof(buffer), 4096), Vector(0x400000, 4096)
for pid in (1, os.getppid()):
    print(libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0), ctypes.get_errno())
