"""The one thread that touches the model. Requests of all clients are drawn in one session of the sampler, so they are
batched as they come; their events go back to the event loop once a step.

When the session fails (weights that are broken, memory that is gone) the requests in flight get the reason, and the
next ones get a new session.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from r1fast.rollout.events import Cancelled, Event, GroupDone
from r1fast.rollout.sampler import SamplingParams

if TYPE_CHECKING:
    from r1fast.rollout.sampler import Sampler
    from r1fast.rollout.session import Session

IDLE = 0.02  # seconds between two looks for jobs while nobody asks for tokens


class EngineError(RuntimeError):
    """The sampler failed, or is going down, while a request was under way."""


class Ticket:
    """One request on its way: its events, in order, for the coroutine that waits for them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.number = -1
        self._events: asyncio.Queue[list[Event] | EngineError] = asyncio.Queue()

    def put(self, events: list[Event] | EngineError) -> None:
        """In the loop's thread."""
        self._events.put_nowait(events)

    async def events(self) -> list[Event]:
        """Those of the next step that has some. EngineError when there are none to come."""
        found = await self._events.get()
        if isinstance(found, EngineError):
            raise found
        return found


class EngineThread:
    """Drives `sampler`, which is nobody else's while this runs. Start, submit and cancel from the event loop."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self._tickets: dict[int, Ticket] = {}
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the tickets and the session
        self._session: Session | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failures = 0

    def start(self) -> None:
        self._session = self.sampler.session()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping.is_set()

    # -- the event loop's thread ------------------------------------------------------------------------------------

    def submit(self, tokens: Sequence[int], params: SamplingParams, stream: bool) -> Ticket:
        """UserError when the request is invalid; EngineError when the server is going down."""
        ticket = Ticket(asyncio.get_running_loop())
        with self._lock:
            if not self.alive:
                raise EngineError("the server is going down")
            ticket.number = self._session.submit(list(tokens), params, stream=stream)
            self._tickets[ticket.number] = ticket
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Gives a request up; nothing where it is over."""
        with self._lock:
            if self._tickets.pop(ticket.number, None) is not None:
                self._session.cancel(ticket.number)

    async def call(self, job: Callable[[], Any]) -> Any:
        """Runs something else on the model, between two steps."""
        future: Future = Future()
        self._jobs.put((job, future))
        return await asyncio.wrap_future(future)

    def stop(self) -> None:
        """Gives everything up: requests in flight end with EngineError."""
        self._stopping.set()

    def join(self) -> None:
        self.stop()
        if self._thread.is_alive():
            self._thread.join()

    # -- its own thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._drive(self._session)
            except Exception as error:  # told to those who wait; the server goes on
                self.failures += 1
                self._renew(EngineError(f"{type(error).__name__}: {error}"))
        with self._lock:
            self._session.close()
            self._fail(EngineError("the server is going down"))
        self._do_jobs(EngineError("the server is going down"))

    def _renew(self, error: EngineError) -> None:
        with self._lock:
            self._session.close()
            self._fail(error)
            try:
                self._session = self.sampler.session()
            except Exception:  # nothing can be drawn any more: `alive` says so
                self._stopping.set()

    def _drive(self, session: Session) -> None:
        while not self._stopping.is_set():
            self._do_jobs()
            if session.wait(timeout=IDLE):
                self._deliver(session.step())

    def _do_jobs(self, refusal: EngineError | None = None) -> None:
        while not self._jobs.empty():
            job, future = self._jobs.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if refusal is not None:
                    raise refusal
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)

    def _deliver(self, events: list[Event]) -> None:
        found: dict[int, list[Event]] = defaultdict(list)
        for event in events:
            found[event.request].append(event)
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, list[Event]]]] = defaultdict(list)
        with self._lock:
            for number, ones in found.items():
                over = isinstance(ones[-1], GroupDone | Cancelled)
                ticket = self._tickets.pop(number, None) if over else self._tickets.get(number)
                if ticket is not None:
                    by_loop[ticket.loop].append((ticket, ones))
        for loop, each in by_loop.items():
            _in(loop, lambda each=each: [ticket.put(ones) for ticket, ones in each])

    def _fail(self, error: EngineError) -> None:
        """Under the lock."""
        for ticket in self._tickets.values():
            _in(ticket.loop, lambda ticket=ticket: ticket.put(error))
        self._tickets.clear()


def _in(loop: asyncio.AbstractEventLoop, call: Callable[[], Any]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(call)
