"""The engine thread: one driver for all requests, whose sequences join and leave between passes.

Whatever touches the model runs in this one thread; what its passes gave goes to the event loop, where the requests wait.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from time import perf_counter
from typing import Any, Protocol

from adi.decoding.records import Event
from adi.decoding.scheduler import Schedulable, Scheduler, Work
from adi.decoding.session import Session
from adi.errors import AdiError
from adi.model.backbone import Backbone
from adi.model.prefix_cache import PrefixCache
from adi.serve.errors import ApiError, refused

USUAL_SECONDS = 10.0  # of a sequence, before one has ended


class ServedSequence(Schedulable, Protocol):
    """A sequence of a request: when the model began to read it, and whether it is at its end."""

    begun: float | None
    ended: bool


class Answer(Session):
    """One answer to a request."""

    begun: float | None = None
    ended = False

    def run(self) -> Work:
        """Its needs and events."""
        self.begun = self.begun or perf_counter()
        yield from super().run()

    def complete(self, stopped: bool) -> None:
        """The text came to its end."""
        super().complete(stopped)
        self.ended = True


@dataclass(frozen=True)
class JobPart:
    """What one pass gave sequence ``index`` of a job, and whether it was the last one."""

    index: int
    events: tuple[Event, ...]
    ended: bool = False


class Job:
    """One request in the engine. Use it in a ``with``: leaving cancels what has not ended."""

    def __init__(self, engine: Engine, count: int, seconds: float) -> None:
        self.engine, self.left, self.submitted = engine, count, perf_counter()
        self.deadline = self.submitted + seconds
        self.sequences: Sequence[Any] = ()
        self.delivered = [self.submitted] * count  # when each sequence last gave something
        self.inbox = asyncio.Queue[JobPart | ApiError]()

    async def parts(self) -> AsyncIterator[JobPart]:
        """What passes gave, as it comes, until all its sequences are at their end; ApiError where one fails."""
        left = len(self.sequences)
        while left:
            item = await self.inbox.get()
            if isinstance(item, ApiError):
                raise item
            left -= item.ended
            yield item

    def cancel(self) -> None:
        """Free its places, before the next pass; nothing happens where all has ended."""
        if self.left:
            self.engine.cancel(self)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()


class Engine:
    """Runs the sequences of all requests: ``most`` at once, and ``queue`` more wait. ``on_part(job, part)`` is called in the
    event loop for each part, ``on_failure`` once, where a bug ended the thread: ``failure`` is then what happened."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        most: int,
        queue: int,
        on_part: Callable[[Job, JobPart], None] = lambda job, part: None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.backbone, self.most, self.places = backbone, most, most + queue
        self.failure: BaseException | None = None
        self._end: ApiError | None = None  # what those are told who come once the thread has ended
        self.open = 0  # sequences that came and are not at their end; this and what follows belongs to the event loop
        self.seconds = USUAL_SECONDS  # that a sequence takes, of late
        self._on_part, self._on_failure = on_part, on_failure
        self._orders = SimpleQueue[Callable[[Scheduler[Any] | None], None] | None]()  # to the driver; None: it has ended
        self._owners: dict[ServedSequence, tuple[Job, int]] = {}  # the engine thread's
        self._thread = threading.Thread(target=self._run, name="adi engine", daemon=True)

    def start(self) -> None:
        """Begin, for the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what still runs is cancelled."""
        self._orders.put(None)
        self._thread.join()

    @property
    def running(self) -> int:
        """Sequences that the model has begun to read."""
        return sum(one.begun is not None for one in tuple(self._owners))

    async def submit(self, make: Callable[[], Sequence[ServedSequence]], count: int, seconds: float) -> Job:
        """A job of the ``count`` sequences that ``make`` makes, in the engine thread, for ``seconds`` at most. ApiError where
        the queue is full (429), and for what the library refuses (400)."""
        if self._end is not None:
            raise self._end
        if count > self.places:
            raise ApiError(400, f"{count} answers were asked for at once; this server has {self.places} places.", param="n")
        if self.open + count > self.places:
            wait = math.ceil(self.seconds * max(1, self.open // self.most))
            said = f"{self.open} answers run or wait, and {count} more would be over {self.places}; try again in {wait} s."
            raise ApiError(429, said, "rate_limit_error", code="queue_full", headers={"Retry-After": str(wait)})
        job, made = Job(self, count, seconds), Future[None]()
        self.open += count
        self._orders.put(lambda scheduler: self._begin(scheduler, job, make, made))
        try:
            await asyncio.wrap_future(made)
        except BaseException as error:
            job.cancel()
            raise refused(error) if isinstance(error, AdiError) else error from None
        return job

    def cancel(self, job: Job) -> None:
        """Nothing more comes of it; its sequences leave before the next pass."""
        self._gone(job, job.left)
        self._orders.put(lambda scheduler: self._drop(scheduler, job))

    def _gone(self, job: Job, count: int) -> None:
        job.left -= count
        self.open -= count

    def _run(self) -> None:
        try:
            kept = PrefixCache(self.backbone)
            with kept, Scheduler[Any](self.backbone, most=self.most, prefix_cache=kept, newcomers=True) as scheduler:
                while self._obey(scheduler):
                    self._tell(self._step(scheduler))
            self._end = ApiError(503, "the server was stopped.", "server_error")
        except BaseException as error:  # handed on: ``failure`` is raised by whoever runs the server
            self.failure, self._end = error, _failed(error)
        self._tell([(job, self._end) for job in {job for job, _ in self._owners.values()}])
        self._owners.clear()
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._refuse_rest)

    def _refuse_rest(self) -> None:
        """In the event loop, where requests are ordered: those that nobody will obey any more."""
        while not self._orders.empty():
            if (order := self._orders.get()) is not None:
                order(None)
        if self.failure is not None:
            self._on_failure()

    def _obey(self, scheduler: Scheduler[Any]) -> bool:
        """Carry out what was ordered, and wait for an order where nothing runs; whether to go on."""
        while not (scheduler.busy and self._orders.empty()):
            if (order := self._orders.get()) is None:
                return False
            order(scheduler)
            del order  # it holds its request while this thread waits for the next one
        return True

    def _begin(
        self, scheduler: Scheduler[Any] | None, job: Job, make: Callable[[], Sequence[ServedSequence]], made: Future[None]
    ) -> None:
        if not made.set_running_or_notify_cancel():
            return
        if scheduler is None:
            made.set_exception(self._end)
            return
        try:
            sequences = make()
        except BaseException as error:  # it is the request's, and raised there
            made.set_exception(error)
            return
        for index, sequence in enumerate(sequences):
            self._owners[sequence] = (job, index)
            scheduler.add(sequence)
        job.sequences = sequences
        made.set_result(None)

    def _drop(self, scheduler: Scheduler[Any] | None, job: Job) -> None:
        if scheduler is None:
            return  # all have been told already
        for sequence in [one for one, (owner, _) in self._owners.items() if owner is job]:
            scheduler.cancel(sequence)
            del self._owners[sequence]

    def _step(self, scheduler: Scheduler[Any]) -> list[tuple[Job, JobPart | ApiError]]:
        """One pass: what it gave to whom, and which jobs failed or ran out of time."""
        events = defaultdict[ServedSequence, list[Event]](list)
        for sequence, event in scheduler.step():
            events[sequence].append(event)
        news: list[tuple[Job, JobPart | ApiError]] = []
        for sequence in [one for one in self._owners if one.ended or one in events]:
            job, index = self._owners.pop(sequence) if sequence.ended else self._owners[sequence]
            news.append((job, JobPart(index, tuple(events[sequence]), sequence.ended)))
        failed = {self._owners[one][0]: refused(error) for one, error in scheduler.failed.items() if one in self._owners}
        scheduler.failed.clear()
        now = perf_counter()
        for job in {job for job, _ in self._owners.values()}:
            if now > job.deadline and job not in failed:
                said = f"the time limit of {job.deadline - job.submitted:g} s for a request was reached."
                failed[job] = ApiError(504, said, "timeout", code="time_limit")
        for job in failed:
            self._drop(scheduler, job)
        return [*news, *failed.items()]

    def _tell(self, news: Sequence[tuple[Job, JobPart | ApiError]]) -> None:
        if news and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand_over, news)

    def _hand_over(self, news: Sequence[tuple[Job, JobPart | ApiError]]) -> None:
        """In the event loop: to those who wait."""
        for job, item in news:
            if not job.left:
                continue  # cancelled meanwhile
            if isinstance(item, JobPart):
                self._gone(job, item.ended)
                self._on_part(job, item)
                job.delivered[item.index] = now = perf_counter()
                if item.ended:
                    self.seconds += 0.1 * (now - job.submitted - self.seconds)
            else:
                self._gone(job, job.left)
            job.inbox.put_nowait(item)


def _failed(error: BaseException) -> ApiError:
    return ApiError(500, f"the engine failed: {type(error).__name__}.", "server_error")
