"""A program that nobody trusts, started where it can do no harm: in namespaces, with limits, inheriting nothing.

`bubblewrap` (the default): a user, process, network, IPC and host-name namespace of its own; the system read-only, no
home, no data, no temporary files of anybody's; a private /tmp of bounded size; no environment, no descriptors, no
sockets; and the limits of `Limits`. As root everything is started as user 65534, so that the kernel counts processes
and checks permissions (for root it does neither).

`rlimits`: the limits alone, for machines where namespaces are forbidden. It does NOT isolate: such a program sees the
network, every file and process that its user may see, and may leave files and processes behind. A recipe must ask for
it by name.

Neither falls back to the other: `why_not` says what is missing, and a run refuses before it starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from r1fast.rewards import seccomp

Kind = Literal["bubblewrap", "rlimits"]
INSTALL = "install it with: apt-get install bubblewrap"
NOBODY = 65534
ROOM = "/sandbox"  # where the harness and the program lie, read-only
INSIDE = Path(__file__).parent / "inside"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")  # beside /usr: links into it, or folders
# An interpreter under somebody's home cannot be reached by user 65534. Root then mounts it where it can be, in a mount
# namespace that only this command sees, and goes on as that user.
_REACH = ("unshare", "--mount", "--propagation", "private", "sh", "-c")
_AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--")
_MOUNT = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
_FREE = "/mnt"  # exists everywhere, and is covered in that namespace alone


class SandboxError(Exception):
    """The sandbox itself failed: nothing is said about the program."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use. Bytes, and seconds of its own time: running or waiting, not queueing for a core."""

    seconds: float = 5.0
    memory: int = 1 << 30  # address space of each process, and resident memory of all together
    processes: int = 16  # threads count
    file: int = 16 << 20  # size of any one file, and of /tmp as a whole
    output: int = 4 << 20  # read of what it writes; more ends it

    def inside(self) -> dict[str, int]:
        """What the harness sets on itself, by RLIMIT name."""
        return {
            "RLIMIT_CPU": int(self.seconds) + 2,  # whole seconds; the watch is finer
            "RLIMIT_AS": self.memory,
            "RLIMIT_FSIZE": self.file,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
            "RLIMIT_NPROC": self.processes,
        }


@dataclass(slots=True)
class Started:
    """A program on its way, and the parent's end of the pipe on which it says that it stands."""

    process: subprocess.Popen
    ready: int
    room: str | None = None  # folder to be removed (rlimits only)

    def close(self) -> None:
        """Ends it and whatever it started; nothing of it is left."""
        if self.room is not None:  # nothing but the group and the parents tell what belongs to it
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # with bubblewrap, the namespace's first process dies with it, and so all in there
        self.process.wait()
        if self.ready >= 0:
            os.close(self.ready)
            self.ready = -1
        if self.room is not None:
            shutil.rmtree(self.room, ignore_errors=True)
            self.room = None


def start(
    mode: str,
    files: dict[str, bytes],
    limits: Limits,
    kind: Kind = "bubblewrap",
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    pipes: dict[str, int] | None = None,
    arguments: tuple[str, ...] = (),
) -> Started:
    """Starts inside/harness.py in `mode`, with `files` beside it. pipes: name -> descriptor that it is given;
    arguments: of the program, names of files."""
    pipes = dict(pipes or {})
    ready, pipes["ready"] = os.pipe()
    job = json.dumps({"limits": limits.inside(), "pipes": pipes, "arguments": arguments})
    files = {**{path.name: path.read_bytes() for path in (INSIDE / "harness.py", INSIDE / "plain.py")}, **files}
    temporary: list[int] = [pipes["ready"]]
    room = None
    try:
        if kind == "bubblewrap":
            command, given = _bubblewrap(limits, files)
            temporary += given
            command += [_python(), "-I", "-S", "-B", "-X", "utf8", f"{ROOM}/harness.py", mode, job]
        else:
            room = _room(files)
            given = []
            command = [*_reached(rlimits=True), "-I", "-S", "-B", "-X", "utf8", f"{room}/harness.py", mode, job]
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL if mode != "probe" else subprocess.PIPE,
            env={"PATH": _PATH, "HOME": "/tmp", "LANG": "C.UTF-8"},
            cwd=room or "/",
            pass_fds=(*given, *pipes.values()),
            start_new_session=True,
        )
    except OSError as error:
        os.close(ready)
        if room is not None:
            shutil.rmtree(room, ignore_errors=True)
        raise SandboxError(f"the sandbox cannot be started: {error}") from None
    finally:
        for descriptor in temporary:
            os.close(descriptor)
    return Started(process, ready, room)


# -- bubblewrap ---------------------------------------------------------------------------------------------------


def _bubblewrap(limits: Limits, files: dict[str, bytes]) -> tuple[list[str], list[int]]:
    """The command up to the program, and the descriptors that it reads files from."""
    command = [*_reached(), "bwrap", *_NAMESPACES, "--uid", str(NOBODY), "--gid", str(NOBODY)]
    command += ["--die-with-parent", "--new-session", "--clearenv"]
    for name, value in (("PATH", "/usr/bin:/bin"), ("HOME", "/tmp"), ("LANG", "C.UTF-8")):
        command += ["--setenv", name, value]
    command += [*_system(), "--proc", "/proc"]
    command += ["--dev", "/dev", "--size", str(1 << 20), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
    given = []
    for name, content in files.items():
        given.append(memory_file(content))
        command += ["--perms", "0444", "--ro-bind-data", str(given[-1]), f"{ROOM}/{name}"]
    command += ["--size", str(limits.file), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    if (calls := seccomp.program()) is not None:
        given.append(memory_file(calls))
        command += ["--seccomp", str(given[-1])]
    return [*command, "--"], given


_NAMESPACES = (
    *("--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
    "--disable-userns",
)


def _system() -> list[str]:
    """Mounts of what an interpreter needs of the machine, read-only: nothing of /etc, /home, /root, /var or data."""
    mounts = ["--ro-bind", "/usr", "/usr"]
    for path in _SYSTEM:
        if os.path.islink(path):
            mounts += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            mounts += ["--ro-bind", path, path]
    mounts += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    prefix = _prefix()
    if not prefix.startswith("/usr"):
        mounts += ["--ro-bind", _FREE if _hidden() else prefix, prefix]
    return mounts


def memory_file(content: bytes) -> int:
    """A descriptor of a file that lives in memory, at its start, and can no longer be changed."""
    import fcntl

    descriptor = os.memfd_create("r1fast", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


# -- the interpreter, and who runs it -------------------------------------------------------------------------------


def _prefix() -> str:
    """The folder of the interpreter itself, below any virtual environment: programs get the standard library."""
    return os.path.realpath(sys.base_prefix)


def _python() -> str:
    return f"{_prefix()}/bin/python{sys.version_info.major}.{sys.version_info.minor}"


@cache
def _hidden() -> bool:
    """Whether an ordinary user cannot reach the interpreter, because it lies under a private folder."""
    if os.geteuid() != 0:
        return False
    prefix = Path(_prefix())
    return any(not folder.stat().st_mode & 0o001 for folder in (prefix, *prefix.parents))


def _reached(rlimits: bool = False) -> list[str]:
    """The command's beginning: root becomes 65534 (having mounted the interpreter within reach), a user stays itself.
    For rlimits it ends with the interpreter."""
    python = []
    if rlimits:
        path = _python()
        python = ["setpriv", "--pdeathsig=KILL", "--", path.replace(_prefix(), _FREE, 1) if _hidden() else path]
    if os.geteuid() != 0:
        return python
    if not _hidden():
        return [*_AS_NOBODY, *python]
    return [*_REACH, _MOUNT, "sh", _prefix(), _FREE, *_AS_NOBODY, *python]


def _room(files: dict[str, bytes]) -> str:
    """A folder for one program without a private /tmp: its working directory, removed with it."""
    room = tempfile.mkdtemp(prefix="r1fast-program-")
    for name, content in files.items():
        Path(room, name).write_bytes(content)
    if os.geteuid() == 0:
        os.chown(room, NOBODY, NOBODY)
    return room


# -- is it there? ---------------------------------------------------------------------------------------------------


@cache
def why_not(kind: Kind = "bubblewrap") -> str | None:
    """Why programs cannot be run here, in one sentence with what to do; None where they can. Tried, not guessed."""
    if sys.platform != "linux":
        return "programs can be run on Linux alone (namespaces, memfd); leave the reward `code` out"
    if kind == "bubblewrap" and shutil.which("bwrap", path=_PATH) is None:
        return (
            f"the reward `code` runs programs under bubblewrap, which is not here: {INSTALL} (or, isolating far less: "
            f"rewards.sandbox=rlimits)"
        )
    said = _probe(kind)
    if said is None:
        return None
    what = "bubblewrap cannot make its namespaces here" if kind == "bubblewrap" else "a limited program cannot run here"
    instead = "; allow unprivileged user namespaces, or set rewards.sandbox=rlimits, which isolates far less"
    return f"{what}: {said}{instead if kind == 'bubblewrap' else ''}"


def _probe(kind: Kind) -> str | None:
    """Runs one empty program; what was said where that fails."""
    try:
        program = start("probe", {"solution.py": b""}, Limits(), kind)
    except SandboxError as error:
        return str(error)
    try:
        _, said = program.process.communicate(timeout=60)
        lines = said.decode("utf-8", "replace").strip().splitlines()
        stands = os.read(program.ready, 1) == b"R"
    except subprocess.TimeoutExpired:
        return "it did not start within 60 s"
    finally:
        with contextlib.suppress(OSError):
            program.close()
    if program.process.returncode == 0 and stands:
        return None
    return lines[-1][:200] if lines else f"exit code {program.process.returncode}"
