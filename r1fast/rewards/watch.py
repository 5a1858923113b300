"""The clock beside a sandboxed program: what it and all it started have used, looked at from outside.

Limits that a process sets on itself hold for it alone; a program with sixteen processes has sixteen of each. Here they
are added up. Time is a program's own: the seconds it spent computing or waiting, without those it queued for a core, so
that a busy machine makes nobody fail, and a program that sleeps is ended as soon as one that spins.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

from r1fast.rewards.sandbox import Limits, SandboxError, Started

STARTUP = 30.0  # seconds until a program stands; 0.05 on a quiet machine
POLL = 0.05  # seconds between looks, and four times that at a program older than a second
PATIENCE = 8  # times its own seconds that a program may take on the wall, however long it queued
# CPU seconds after which a program makes way, and its nice value then: a third of the weight. With 19 (a seventieth) a
# right program of one second is starved by short ones on a busy machine.
HOG, MANNERS = 0.5, 5
_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Exceeded(Exception):
    """A limit was reached; the words say which."""


def tree(pid: int) -> Iterator[int]:
    """`pid` and its descendants, as far as they are alive."""
    yield pid
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                children = file.read().split()
            for child in children:
                yield from tree(int(child))


class Watch:
    """Programs that have one budget together: a candidate, and the test that asks it."""

    def __init__(self, programs: list[Started], limits: Limits) -> None:
        self.programs, self.limits = programs, limits
        self.began = time.monotonic()
        self.cpu = 0.0
        self._base = self._delay = 0.0  # CPU and queueing seconds before `began`
        self._looked = self.began
        self._demoted: set[int] = set()

    def wait_ready(self) -> None:
        """Returns when all stand; SandboxError where one does not."""
        deadline = time.monotonic() + STARTUP
        for program in self.programs:
            readable, _, _ = select.select([program.ready], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise SandboxError(f"a program did not start within {STARTUP:g} s")
            if os.read(program.ready, 1) != b"R":
                code = program.process.wait()
                raise SandboxError(f"the sandbox ended before the program began (exit code {code})")
            os.close(program.ready)
            program.ready = -1
        self.restart()

    def restart(self) -> None:
        """The budget of time anew, for the next of several tests."""
        self.began = time.monotonic()
        self._base = self._look()[0]
        self._delay = self._delays()

    def check_sometimes(self) -> None:
        """`check`, at most every POLL seconds: a program that talks much must not be looked at for every word."""
        now = time.monotonic()
        if now - self._looked >= (POLL if now - self.began < 1.0 else 4 * POLL):
            self._looked = now
            self.check()

    def check(self) -> None:
        """Exceeded where the programs have used more than they may."""
        cpu, memory = self._look()
        self.cpu = cpu - self._base
        wall = time.monotonic() - self.began
        own = wall - max(0.0, self._delays() - self._delay)
        seconds = self.limits.seconds
        if max(self.cpu, own) > seconds:
            raise Exceeded(f"no end within {seconds:g} s")
        if wall > PATIENCE * seconds:  # nothing is said about a program that hardly ran
            busy = f"the machine is too busy: {own:.1f} of {seconds:g} s in {wall:.0f}"
            raise SandboxError(f"{busy}; lower rewards.workers")
        if memory > self.limits.memory:
            raise Exceeded(f"more than {self.limits.memory >> 20} MiB of memory")

    def _processes(self) -> Iterator[int]:
        for program in self.programs:
            yield from tree(program.process.pid)

    def _look(self) -> tuple[float, int]:
        """(CPU seconds, resident bytes) of all; whoever has computed much already makes way for the others."""
        ticks, pages = 0, 0
        pids = list(self._processes())
        for pid in pids:
            with contextlib.suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                    fields = file.read().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))  # its own and its ended children's, user and system
                pages += int(fields[21])
        if ticks / _TICK > HOG:
            for pid in set(pids) - self._demoted:
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, pid, MANNERS)
                self._demoted.add(pid)
        return ticks / _TICK, pages * _PAGE

    def _delays(self) -> float:
        """Seconds that the programs' processes have queued for a core: the most of each program's, added."""
        total = 0.0
        for program in self.programs:
            longest = 0
            for pid in tree(program.process.pid):
                with contextlib.suppress(OSError, ValueError, IndexError):
                    longest = max(longest, int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]))
            total += longest / 1e9
        return total


def pump(
    watch: Watch, source: int, limit: int, send: tuple[int, bytes] | None = None, line: bool = False
) -> tuple[bytes, bool]:
    """Reads `source` under the watch until its end (or, with `line`, through the first line end), while writing `send`.

    Returns what was read and whether the end came. Also ends when the watched programs' first process has: what a
    left-over process of it holds open is not waited for. Exceeded for time, memory, and more than `limit` bytes.
    """
    read, rest = bytearray(), memoryview(send[1] if send else b"")
    ended = os.pidfd_open(watch.programs[0].process.pid)
    gone = False
    try:
        while True:
            writers = [send[0]] if send and len(rest) else []
            wanted = [source] if gone else [source, ended]
            readable, writable, _ = select.select(wanted, writers, [], 0.0 if gone else POLL)
            if writable:
                try:
                    rest = rest[os.write(send[0], rest[:4096]) :]
                except BrokenPipeError:
                    return bytes(read), True
            if source in readable:
                chunk = os.read(source, 65536)
                read += chunk
                if len(read) > limit:
                    raise Exceeded(f"more than {limit} bytes of output")
                if not chunk or (line and chunk.endswith(b"\n")):
                    return bytes(read), not chunk
            elif gone:
                return bytes(read), True
            gone = gone or ended in readable
            watch.check_sometimes()
    finally:
        os.close(ended)
