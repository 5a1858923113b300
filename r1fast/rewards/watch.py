"""The clock beside a sandboxed program: what it and all it started have used, looked at from outside.

Limits that a process sets on itself hold for it alone; a program with sixteen processes has sixteen of each. Here they
are added up. Time is a program's own: the seconds it spent computing or waiting, without those it queued for a core or
stood still, so that a busy machine makes nobody fail, and a program that sleeps is ended as soon as one that spins.

In a pool, a program that has computed for SHARE seconds is stopped until no fresh one waits or no room is left (lane.py
and pool.py). Priorities do not do it: each program is a session of its own, and with the kernel's autogroups a nice
value counts within a session alone.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from math import inf
from pathlib import Path

from r1fast.rewards import lane
from r1fast.rewards.sandbox import Limits, SandboxError, Started

STARTUP = 30.0  # seconds until a program stands; 0.05 on a quiet machine
POLL = 0.05  # seconds between looks; half of that at one younger than half a second, four times at one older than one
PATIENCE = 8  # times its own seconds that a program may take on the wall, however long it queued
SHARE = 0.1  # CPU seconds after which a program makes way; most right ones need a tenth of that
WAITING = 0.15  # seconds of which it computes for less than a quarter: it waits, and needs no lane for that
PASSES = 20  # looks for what a program has started while it is being stopped; two do, but for one that always forks
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
        self._queued = 0.0  # as far as it was seen: a process that has ended takes its record along
        self._looked = self.began
        self._lane = lane.current.get()
        self._share = SHARE  # CPU seconds, all in all, at which it makes way
        self._window = (0.0, 0.0)  # CPU and own seconds when it was last seen whether it waits

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
        self._share += self._base

    def restart(self) -> None:
        """The budget of time anew, for the next of several tests."""
        self.began = time.monotonic()
        self._base = self._look()[0]
        self._delay = self._delays()
        self._window = (self._base, 0.0)

    def check_sometimes(self) -> None:
        """`check`, at most every POLL seconds: a program that talks much must not be looked at for every word."""
        now = time.monotonic()
        age = now - self.began
        if now - self._looked >= (POLL / 2 if age < 0.5 else POLL if age < 1.0 else 4 * POLL):
            self._looked = now
            self.check()

    def check(self) -> None:
        """Exceeded where the programs have used more than they may."""
        cpu, memory = self._look()
        self.cpu = cpu - self._base
        wall = time.monotonic() - self.began
        own = wall - (self._delays() - self._delay)
        seconds = self.limits.seconds
        if max(self.cpu, own) > seconds:
            raise Exceeded(f"no end within {seconds:g} s")
        if wall > PATIENCE * seconds:  # nothing is said about a program that hardly ran
            busy = f"the machine is too busy: {own:.1f} of {seconds:g} s in {wall:.0f}"
            raise SandboxError(f"{busy}; lower rewards.workers")
        if memory > self.limits.memory:
            raise Exceeded(f"more than {self.limits.memory >> 20} MiB of memory")
        if self._lane is not None:
            self._make_way(cpu, own, memory)

    # -- making way for others ---------------------------------------------------------------------------------------

    def _make_way(self, cpu: float, own: float, memory: int) -> None:
        if cpu > self._share:
            self._park(memory)
            self._window = (cpu, own)
        elif self._lane.held and own - self._window[1] > WAITING:
            if cpu - self._window[0] < WAITING / 4:
                self._lane.leave(memory)
                self._share = cpu + SHARE
            self._window = (cpu, own)

    def _park(self, memory: int) -> None:
        """Stands still until there is a lane, which it then has for good; or keeps its lane if it cannot be stopped."""
        since = time.monotonic()
        if self._stop():
            self._lane.park(memory)
        self._signal(signal.SIGCONT)
        self._share = inf
        self.began += time.monotonic() - since

    def _stop(self) -> bool:
        """Whether all processes stand still; what one started before it stopped is found by looking again."""
        stopped: set[int] = set()
        for _ in range(PASSES):
            found = set(self._processes())
            if found <= stopped:
                return True
            self._signal(signal.SIGSTOP, found - stopped)
            stopped |= found
        return False

    def _signal(self, number: int, pids: set[int] | None = None) -> None:
        for pid in pids or self._processes():
            with contextlib.suppress(OSError):
                os.kill(pid, number)

    # -- what they use -----------------------------------------------------------------------------------------------

    def _processes(self) -> Iterator[int]:
        for program in self.programs:
            yield from tree(program.process.pid)

    def _look(self) -> tuple[float, int]:
        """(CPU seconds, resident bytes) of all."""
        ticks, pages = 0, 0
        for pid in self._processes():
            with contextlib.suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                    fields = file.read().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))  # its own and its ended children's, user and system
                pages += int(fields[21])
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
        self._queued = max(self._queued, total)
        return self._queued


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
            readable, writable, _ = select.select(wanted, writers, [], 0.0 if gone else POLL / 2)
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
