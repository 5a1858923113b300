"""System calls that no honest program of a coding problem makes, refused by the kernel inside the sandbox.

Namespaces hide what is outside; this filter keeps a program from holding memory that no limit counts (memfd, shared
segments), from opening sockets at all, and from the parts of the kernel where holes have been found (keys, bpf,
io_uring, userfaultfd, mounts). It is a classic BPF program for `bwrap --seccomp`, written out here because the
library that makes them (libseccomp) is not on every machine.
"""

from __future__ import annotations

import platform
import struct

# name -> (x86_64, aarch64); the numbers of Linux's syscall tables, which never change.
_REFUSED = {
    "socket": (41, 198),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "syslog": (103, 116),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "swapon": (167, 224),
    "reboot": (169, 142),
}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*

_LOAD, _EQUAL, _ABOVE, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_RET|K
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # SECCOMP_RET_*; refused with EPERM
_X32 = 0x40000000  # x86_64's second table of the same calls


def _op(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, k)


def program() -> bytes | None:
    """The filter for this machine, an array of `struct sock_filter`; None where its system calls are not known."""
    known = _ARCHITECTURES.get(platform.machine())
    if known is None:
        return None
    column, architecture = known
    numbers = [both[column] for both in _REFUSED.values()]
    code = [_op(_LOAD, 4), _op(_EQUAL, architecture, yes=1), _op(_RETURN, _KILL), _op(_LOAD, 0)]
    code += [_op(_ABOVE, _X32, no=1), _op(_RETURN, _REFUSE)]
    for i, number in enumerate(numbers):
        code.append(_op(_EQUAL, number, yes=len(numbers) - i))  # past the rest and the `allow`
    return b"".join([*code, _op(_RETURN, _ALLOW), _op(_RETURN, _REFUSE)])
