"""The pool's end of one worker process: what it has been asked, what it says of that, and how it is ended."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from math import inf
from typing import Literal

from r1fast import plugins
from r1fast.rewards.base import Reference, Score, get, settings

STARTUP = 120.0  # seconds for a worker to import what a reward needs; sympy takes several on a busy machine
SLOW = 0.5  # seconds after which an item no longer holds up its lane, where its reward does not make way by itself

Item = tuple[str, str, Reference]  # reward's name, completion, reference


@dataclass(slots=True)
class Job:
    """One item on its way."""

    number: int
    reward: str
    seconds: float  # that it may take
    expires: float  # when it is late; while it is parked, the seconds that were left
    slow: float  # when it no longer holds up its lane
    place: Literal["lane", "beside", "parked"] = "lane"
    resident: int = 0  # bytes of memory when it last made way

    def holds(self, now: float) -> bool:
        """Whether it takes a lane from others."""
        return self.place == "lane" and now < self.slow


class Worker:
    """One process and what it is doing: one item, and beside it those that made way."""

    def __init__(self) -> None:
        # -P keeps the working directory from the front of the path; the parent's own path is handed on whole. One
        # arena of malloc's: an item has a thread, and each arena takes 64 MiB of the address space that is limited.
        path = os.pathsep.join(os.path.abspath(p) for p in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "r1fast.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"},
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        self.jobs: dict[int, Job] = {}
        self._prepared: set[str] = set()
        self._buffer = b""
        given = {"settings": settings().model_dump(mode="json"), "plugins": plugins.loaded()}
        with contextlib.suppress(BrokenPipeError):  # found dead when it is asked something
            self._write(given)

    @property
    def idle(self) -> bool:
        """Whether it may be given another item."""
        return all(job.place != "lane" for job in self.jobs.values())

    def _write(self, message: dict) -> None:
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def send(self, number: int, item: Item, seconds: float) -> None:
        """Asks for a verdict within `seconds`. BrokenPipeError when the process is gone."""
        name, completion, reference = item
        self.jobs[number] = job = Job(number, name, seconds, expires=inf, slow=inf)
        self._start_clock(job)
        question = {"reward": name, "completion": completion, "reference": reference, "seconds": seconds}
        self._write({"job": number, "module": type(get(name)).__module__, **question})

    def resume(self, job: Job) -> None:
        """Gives a parked job its lane. BrokenPipeError when the process is gone."""
        job.place, job.expires = "lane", time.monotonic() + job.expires
        self._write({"go": job.number})

    def allowed(self, job: Job) -> float:
        """Seconds that this job has had, all in all."""
        return job.seconds if job.reward in self._prepared else STARTUP

    def _start_clock(self, job: Job) -> None:
        now, prepared = time.monotonic(), job.reward in self._prepared
        job.expires = now + self.allowed(job)
        job.slow = inf if get(job.reward).makes_way else now + (SLOW if prepared else STARTUP)

    def receive(self) -> dict[int, Score]:
        """The verdicts that have arrived, by job; what else was said is noted. EOFError when the process is gone."""
        chunk = os.read(self.process.stdout.fileno(), 65536)
        if not chunk:
            raise EOFError
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        verdicts = {}
        for line in lines:
            said = json.loads(line)
            job = self.jobs[said["job"]]
            match said["says"]:
                case "prepared":
                    self._prepared.add(job.reward)
                    self._start_clock(job)  # it starts when the imports are done
                case "beside":
                    job.place, job.resident = "beside", said["resident"]
                case "parked":
                    job.place, job.resident = "parked", said["resident"]
                    job.expires -= time.monotonic()
                case "verdict":
                    del self.jobs[job.number]
                    verdicts[job.number] = Score(said["value"], said["error"])
        return verdicts

    def kill(self) -> int:
        """Ends the process whatever it is doing; its exit code."""
        self.process.kill()
        code = self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # the rest of a message to a process that died while reading it
            self.process.stdin.close()
        return code
