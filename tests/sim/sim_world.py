"""The simulated world: one clock, one queue of what happens next, one seed, and programs that live in it.

A program is an asyncio event loop of its own (`SimLoop`), so the services run as they are: every `await` is a place
where the seed may let something else happen first. Nothing here waits in real time.

Invariants:
    What happens is a function of the seed: time, order and outcomes come from `World.rng`, never from the machine.
    A dead program does nothing any more; what it had begun is what its disk and its peers have seen.
    `digest` covers every event, every byte written and every byte sent: equal digests are equal runs.
"""

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import xxhash

START_NS = 1_000_000_000
TRAIL_MAX = 150


class Died(BaseException):
    """A program ends here, in the middle of what it does."""


class Violation(AssertionError):
    """A judge saw a promise broken."""


class World:
    """Clock and queue. `points` counts the moments at which a crash plan may strike."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now_ns = START_NS
        self.events = 0
        self.points = 0
        self.on_point: Callable[[str], Sequence[SimLoop]] | None = None
        self.trail: deque[str] = deque(maxlen=TRAIL_MAX)
        self.excuses: list[str] = []  # media faults so far: an error to a guest is no violation then
        self.store_refuses = False  # because of one: what waits for the store waits for ever
        self._doomed: list[SimLoop] = []
        self._queue: list[tuple[int, int, Callable[..., object], tuple[object, ...]]] = []
        self._serial = 0
        self._hash = xxhash.xxh3_128()

    def rng(self, name: str) -> random.Random:
        """Return a stream of its own for one part of the world."""
        return random.Random(f"{self.seed}/{name}")

    @property
    def digest(self) -> str:
        """What sets this run apart from every other."""
        return self._hash.hexdigest()

    def note(self, text: str, content: bytes = b"", *, quiet: bool = False) -> None:
        """Make something part of the digest and, unless quiet, of what a failure prints."""
        self._hash.update(f"{self.now_ns} {text}\n".encode())
        self._hash.update(content)
        if not quiet:
            self.trail.append(f"{self.now_ns / 1e9:12.6f} {text}")

    def at(self, delay_ns: int, act: Callable[..., object], *args: object) -> None:
        """Let something happen later; what is due at one moment happens in the order of these calls."""
        self._serial += 1
        heapq.heappush(self._queue, (self.now_ns + max(0, delay_ns), self._serial, act, args))

    def point(self, text: str, victim: "SimLoop | None" = None) -> None:
        """A crash may strike here: at once if it strikes `victim`, whose code is running, else behind this event."""
        self.points += 1
        if self.on_point is None:
            return
        for doomed in self.on_point(text):
            if doomed is victim:
                raise Died
            self._doomed.append(doomed)

    def step(self) -> None:
        """Let the next thing happen."""
        self.now_ns, _, act, args = heapq.heappop(self._queue)
        self.events += 1
        act(*args)
        while self._doomed:
            self._doomed.pop().die()

    def run(self, reached: Callable[[], bool], *, limit_s: float) -> None:
        """Go on until something is reached."""
        limit_ns = self.now_ns + int(limit_s * 1e9)
        while not reached():
            self.step()
            if self.now_ns > limit_ns:
                raise Violation(f"no progress within {limit_s:g} simulated seconds")

    def run_for(self, delay_ns: int) -> None:
        """Let time pass."""
        until = self.now_ns + delay_ns
        while self._queue and self._queue[0][0] <= until:
            self.step()
        self.now_ns = max(self.now_ns, until)


class SimLoop(asyncio.AbstractEventLoop):
    """One life of a program: what asyncio code needs of its event loop, on the world's clock."""

    def __init__(self, world: World, name: str, on_death: Callable[[], None]) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self._on_death = on_death
        self._random = world.rng(f"{name} loop {world.now_ns}")
        self._ready: deque[asyncio.Handle] = deque()
        self._tasks: list[asyncio.Task[Any]] = []
        self._lanes: dict[object, deque[Callable[[], None]]] = {}

    # --- life -------------------------------------------------------------------------------------------------

    def enter(self, act: Callable[..., object], *args: object) -> None:
        """Run code of this program now, unless it is dead; this is how everything from outside comes in."""
        if not self.alive:
            return
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        died = False
        try:
            act(*args)
        except Died:
            died = True
        finally:
            asyncio._set_running_loop(before)
        if died:
            self.die()

    def after(self, delay_ns: int, act: Callable[..., object], *args: object) -> None:
        """Enter later."""
        self.world.at(delay_ns, self.enter, act, *args)

    def die(self) -> None:
        """As by kill -9. Coroutines are closed here and now: the garbage collector knows no seed."""
        if not self.alive:
            return
        self.alive = False
        self._ready.clear()
        asyncio._set_running_loop(self)
        try:
            for task in self._tasks:
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    task.get_coro().close()  # type: ignore[union-attr]
        finally:
            asyncio._set_running_loop(None)
        self._on_death()

    # --- what asyncio asks for --------------------------------------------------------------------------------

    def time(self) -> float:
        return self.world.now_ns / 1e9

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self.alive

    def is_closed(self) -> bool:
        return not self.alive

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], *, name=None, context=None) -> asyncio.Task[Any]:
        if not self.alive:
            coro.close()
            return self.create_future()  # type: ignore[return-value]
        task = asyncio.Task(coro, loop=self, name=name or self.name)
        if len(self._tasks) > 200:
            self._tasks = [one for one in self._tasks if not one.done()]
        self._tasks.append(task)
        return task

    def call_soon(self, callback, *args, context=None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        if self.alive:
            if not self._ready:
                # A loop is not always on a processor when something is ready for it.
                self.world.at(self._random.randrange(20_000), self._run_ready)
            self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(self, delay: float, callback, *args, context=None) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(self, when: float, callback, *args, context=None) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self.world.at(int((when - self.time()) * 1e9), self._run_timer, handle)
        return handle

    def run_in_executor(self, executor, func, *args) -> asyncio.Future[Any]:
        """Threads of the real program: those of one worker keep their order, others don't."""
        future = self.create_future()

        def work() -> None:
            result, error = None, None
            try:
                result = func(*args)
            except Exception as caught:
                error = caught
            self.after(self._random.randrange(50_000), told, result, error)

        def told(result: object, error: Exception | None) -> None:
            lane.popleft()
            if lane:
                self.after(self._random.randrange(300_000), lane[0])
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        ordered = getattr(executor, "_max_workers", 4) == 1
        lane = self._lanes.setdefault(executor, deque()) if ordered else deque()
        lane.append(work)
        if len(lane) == 1:
            self.after(self._random.randrange(300_000), work)
        return future

    def add_reader(self, fd, callback, *args) -> None:
        fd.set_reader(callback)

    def remove_reader(self, fd) -> bool:
        fd.set_reader(None)
        return True

    def add_writer(self, fd, callback, *args) -> None:
        raise AssertionError("simulated sockets take everything")

    def remove_writer(self, fd) -> bool:
        return True

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """The daemons end on an exception that nobody expected; here it ends the run."""
        error = context.get("exception")
        if self.alive and error is not None:
            raise error

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def _run_ready(self) -> None:
        for _ in range(len(self._ready)):
            if self._ready:
                self._run(self._ready.popleft())
        if self._ready:
            self.world.at(self._random.randrange(20_000), self._run_ready)

    def _run_timer(self, handle: asyncio.TimerHandle) -> None:
        self._run(handle)

    def _run(self, handle: asyncio.Handle) -> None:
        if not handle.cancelled():
            self.enter(handle._context.run, handle._callback, *handle._args)  # type: ignore[attr-defined]
