"""The driver: one or many sequences, each at its own length and depth, in shared passes. ``generate`` runs it with one.

A sequence is a generator of needs (block passes, head passes) and events. The driver collects what all of them need next and
serves it together, passes that begin at the lowest block first, so that sequences which lag catch up and share what lies above.
Reading weights is most of the cost of a pass over few rows, so eight sequences in one pass cost little more than one. Beyond
some rows (64) a pass gains nothing more, and its kernels have other bits than a sequence alone gets: those that waited longest
go first. A long prompt goes in parts, beside the rows of those that are answered (Agrawal et al. 2023), as long ones as these
can wait for.

A verified round of sequence A beside a sequence B, one call of ``step`` a line::

    A: Drafted, Drafted, needs blocks 0-30 of 3 rows    B: needs blocks 0-30 of 1 row     step: one pass over 4 rows
    A: needs the head for 3 rows                        B: needs the head for 1 row       step: one call of the head
    A: Step (accepted), Rejected(1), Step               B: Step                           before the next pass
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from time import perf_counter
from typing import Any, Generic, Protocol, TypeVar

from adi.decoding.drafting.rounds import DraftRound, draft_together
from adi.decoding.drafting.trial import RoundClock, Trials
from adi.decoding.frontier import BlockPass, Frontier, HeadPass
from adi.decoding.passes.sharing import Pace, begins_prompt, beside, chosen_for, cut, rows_beside, sharing
from adi.decoding.records import Drafted, DriftFound, Event, Rejected, Step
from adi.decoding.stop_strings import StopStrings
from adi.errors import AdiError, MemoryFullError, NoDistributionError
from adi.model.backbone import PROMPT_ROWS, Backbone, States
from adi.model.prefix_cache import PrefixCache

ENDED = object()
LEAST_SHARED = 16  # tokens, of which a prompt waits for another that is being read and begins with them too
SETTLED_ROWS = 64  # of a text that ended are read in one pass, so that who comes meanwhile does not wait long
NEXT_TOKENS = 32  # of each sequence, for which KV memory should be free when another joins
MOST = 32
Need = BlockPass | HeadPass | DraftRound


@dataclass(frozen=True, slots=True)
class Served:
    """The reply to a need. ``result`` is, for a ``BlockPass``, itself or a lower part of it with the states that it gave; for a
    ``HeadPass``, what it gives for each of its rows. ``seconds`` are the engine's alone, of a pass or call of so many ``rows``,
    other sequences' among them."""

    result: Any
    seconds: float = 0.0
    rows: int = 0


Work = Generator[Need | Event, Served | None, None]


class Schedulable(Protocol):
    """What the driver can run; ``decoding.session.Session`` is one."""

    @property
    def frontier(self) -> Frontier: ...

    @property
    def prompt_ids(self) -> tuple[int, ...]: ...

    @property
    def text_ids(self) -> tuple[int, ...]:
        """The prompt and the tokens so far."""
        ...

    @property
    def budget(self) -> int:
        """Most new tokens."""
        ...

    @property
    def trials(self) -> Trials | None:
        """What settles whether it drafts where others share its passes; None where nothing does."""
        ...

    def stops(self) -> StopStrings:
        """What watches for the texts that end the output, anew for each run."""
        ...

    def run(self) -> Work:
        """Its needs, each answered with ``Served``, and its events."""
        ...

    def restart(self) -> None:
        """Be as new: ``run`` will give the same again."""
        ...

    def complete(self, stopped: bool) -> None:
        """It came to its end, ``stopped`` by a stop string. Not called for one that is cancelled or fails."""
        ...

    def close(self) -> None:
        """Free KV memory; it ended, failed or was cancelled, perhaps before ``run``. Closing twice is allowed."""
        ...


S = TypeVar("S", bound=Schedulable)


class Observer(Generic[S]):
    """Sees what the network computes for each sequence of a ``Scheduler``. Override what you need."""

    def on_pass(self, sequence: S, done: BlockPass, states: States) -> None:
        """Blocks ``[done.lo, done.hi)`` ran over ``done.rows``; ``states`` are theirs. Not called for provisional passes."""

    def on_scores(self, sequence: S, head: HeadPass, scores: Any) -> None:
        """The head scored ``head.states``: a token per row, or ``logits_TV`` where ``head.logits``."""

    def on_restart(self, sequence: S) -> None:
        """KV memory was full: the sequence begins again, and will give the same."""


@dataclass(eq=False)
class _Entry(Generic[S]):
    """A sequence in the driver: what it needs next, and which of its events the consumer has."""

    sequence: S
    work: Work = field(init=False)
    stops: StopStrings = field(init=False)
    need: Need | None = None
    reply: Served | None = None  # to its last need
    served: int = 0  # when a need of it was last served
    delivered: int = 0  # steps (and drift) that the consumer has
    repeated: int = 0  # of these, since it began again
    drafts: int = 0  # that the consumer has, and nobody verified yet
    ended: bool = False  # or failed, or cancelled
    completed: bool = False

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.work, self.stops = self.sequence.run(), self.sequence.stops()
        self.need = self.reply = None

    def end(self) -> None:
        """Nothing comes of it from now on, and its KV memory is free."""
        self.ended = True
        self.work.close()
        self.sequence.close()

    def advance(self) -> Iterator[Event]:
        """Send the reply and run to the next need, or to its end; the events on the way. It may be cancelled at any of them."""
        while self.stops.hit is None:
            reply, self.reply = self.reply, None
            try:
                item = self.work.send(reply)
            except StopIteration:
                break
            except BaseException:
                self.end()
                raise
            if isinstance(item, Need):
                self.need = item
                return
            yield from self._undelivered(self.stops.push(item))
            if self.ended:
                return
        yield from self._undelivered(self.stops.rest())
        if not self.ended:
            self.end()
            self.sequence.complete(self.stops.hit is not None)
            self.completed = True

    def _undelivered(self, events: Sequence[Event]) -> Iterator[Event]:
        """Those that the consumer did not have before a restart, after which steps are the same; drafts may differ."""
        for event in events:
            if self.ended:
                return
            old = self.repeated < self.delivered
            self.repeated += isinstance(event, (Step, DriftFound))
            if not old:
                self.delivered = self.repeated
                if isinstance(event, Rejected):  # those among them that came before are not the consumer's
                    event = Rejected(min(event.count, self.drafts))
                    if not event.count:
                        continue
                self.drafts = max(0, self.drafts + _more_drafts(event))
                yield event

    def restart(self) -> list[Event]:
        """Free all KV memory and be as new; drafts that the consumer has are taken back."""
        self.work.close()
        self.sequence.close()
        self.sequence.restart()
        rejected: list[Event] = [Rejected(self.drafts)] if self.drafts else []
        self.drafts = self.repeated = 0
        self.begin()
        return rejected


def _more_drafts(event: Event) -> int:
    """By how many more or fewer drafts are open after this event."""
    match event:
        case Drafted():
            return 1
        case Rejected():
            return -event.count
        case Step(drafted=True, accepted=True):
            return -1
    return 0


class Scheduler(Generic[S]):
    """Runs sequences of a model. Iterating gives ``(sequence, event)`` until all are at their end, ``step`` those of one pass.
    Sequences may be added and cancelled between steps. Close it, or use it in a ``with``.

    Where KV memory is full, the sequence that joined last makes room, those that have no token yet before others, and begins
    again later; what its consumer has had is not given twice. From then on a sequence joins only where all that run may become
    as long as their budget allows: so none begins again twice, and the oldest always goes on.

    With a ``prefix_cache`` each begins with what is known of its prompt, or waits until another has read what they share, and
    texts that ended are read again, as their next turn's prompt will be, once nothing else is to be done.

    ``patient``: nobody reads the answers as they come, so prompts are read first, in whole passes: less time in all.
    ``newcomers``: others may come while a prompt is read, so its passes are short even where nobody waits.

    One that does not fit even alone, or raises an AdiError, is put into ``failed``, never completed; the others go on. A bug in
    one is raised, once.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        most: int = MOST,
        observer: Observer[S] | None = None,
        prefix_cache: PrefixCache | None = None,
        patient: bool = False,
        newcomers: bool = False,
    ) -> None:
        self.backbone, self.most, self.observer = backbone, most, observer or Observer()
        self.prefix_cache = prefix_cache
        self.failed: dict[S, AdiError] = {}
        self._waiting: deque[_Entry[S]] = deque()
        self._running: list[_Entry[S]] = []  # in the order in which they joined
        self._settling: deque[Iterator[None]] = deque()  # texts that ended, to be read again
        self._crowded = False
        self._clock = RoundClock()
        self._pace = None if patient else Pace(alone=PROMPT_ROWS[0] if newcomers else None)

    @property
    def busy(self) -> bool:
        """Whether a sequence waits or runs, or a text that ended is to be read again."""
        return bool(self._waiting or self._running or self._settling)

    def add(self, sequence: S) -> None:
        """It joins with the next step, or when there is room."""
        self._waiting.append(_Entry(sequence))

    def cancel(self, sequence: S) -> None:
        """Give it up, also while its events or another's are read: its KV memory is free at once, and it is never complete.
        Nothing happens where it is at its end."""
        for entry in (*self._running, *self._waiting):
            if entry.sequence is sequence:
                self._drop(entry)

    def close(self) -> None:
        """Cancel all."""
        for entry in (*self._running, *self._waiting):
            self._drop(entry)
        self._settling.clear()

    def _drop(self, entry: _Entry[S]) -> None:
        for entries in (self._running, self._waiting):
            if entry in entries:
                entries.remove(entry)
        entry.end()

    def __enter__(self) -> Scheduler[S]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[S, Event]]:
        while self.busy:
            yield from self._step()

    def step(self) -> list[tuple[S, Event]]:
        """Let waiting sequences join, then one pass, or one call of the head, for all that can share it."""
        return list(self._step())

    def _step(self) -> Iterator[tuple[S, Event]]:
        """Each event as soon as it is there, so that none is lost where a later one fails."""
        if not self._waiting and not self._running and self._settling:
            if next(self._settling[0], ENDED) is ENDED:
                self._settling.popleft()
            return
        yield from self._join()
        yield from self._advance()
        while True:
            try:
                self._serve()
                break
            except MemoryFullError as error:  # before anything has run
                if self._settling:
                    self._settling.clear()
                else:
                    yield from self._make_room(error)
        yield from self._advance()

    def _advance(self) -> Iterator[tuple[S, Event]]:
        """Run all that need nothing by now."""
        for entry in [one for one in self._running if one.need is None]:
            try:
                for event in () if entry.ended else entry.advance():
                    yield entry.sequence, event
            except AdiError as error:
                self.failed[entry.sequence] = error
            finally:
                if entry.ended:
                    self._drop(entry)
                if entry.completed:
                    self._read_again(entry.sequence)

    def _join(self) -> Iterator[tuple[S, Event]]:
        for entry in list(self._waiting):
            if len(self._running) >= self.most or not self._has_room_for(entry):
                return
            if self._awaits_another(entry) or entry not in self._waiting:  # cancelled meanwhile
                continue
            self._waiting.remove(entry)
            if self.prefix_cache is not None:
                entry.sequence.frontier.reuse(self.prefix_cache, entry.sequence.prompt_ids)
            self._running.append(entry)
            yield from self._advance()

    def _awaits_another(self, entry: _Entry[S]) -> bool:
        """Whether one that runs is reading something that this one then need not read."""
        if self.prefix_cache is None:
            return False
        ids = entry.sequence.prompt_ids
        others = [o.sequence.prompt_ids for o in self._running if o.sequence.frontier.filled[-1] < len(o.sequence.prompt_ids)]
        alike = [other for other in others if other[:LEAST_SHARED] == ids[:LEAST_SHARED] and len(ids) >= LEAST_SHARED]
        shared = LEAST_SHARED + (self.prefix_cache.match(ids) if alike else 0)
        return any(other[:shared] == ids[:shared] for other in alike if min(len(ids), len(other)) >= shared)

    def _read_again(self, sequence: S) -> None:
        """Have an answer kept too, where that is wanted, once nothing else is to be done."""
        kept = self.prefix_cache
        if kept is not None and kept.answers and len(sequence.text_ids) > len(sequence.prompt_ids):
            self._settling.append(self._settle(kept, sequence.text_ids))

    def _settle(self, prefix_cache: PrefixCache, ids: tuple[int, ...]) -> Iterator[None]:
        """Read a text that ended as the prompt that it will be the beginning of, so that the prefix cache has it; one pass each
        time. Where KV memory is full it is let be."""
        frontier, layers = Frontier(self.backbone), self.backbone.spec.layers
        try:
            frontier.reuse(prefix_cache, ids)
            frontier.read(ids[: max(frontier.length, self.backbone.spec.whole(len(ids)))])
            while (ahead := frontier.next_pass(layers)) is not None:
                ahead = cut(self.backbone.spec, ahead, SETTLED_ROWS)
                (states,) = self.backbone.forward([ahead.rows], ahead.lo, ahead.hi)
                frontier.absorb(ahead, states)
                yield
        except MemoryFullError:
            return
        finally:
            frontier.close()

    def _has_room_for(self, entry: _Entry[S]) -> bool:
        if not self._running:
            return True  # if it does not fit now, it never will
        return self.backbone.fits([(one.sequence.frontier.cache, self._length(one)) for one in (*self._running, entry)])

    def _length(self, entry: _Entry[S]) -> int:
        """How long a sequence may become before another one ends: while memory was never full, a guess."""
        prompt = len(entry.sequence.prompt_ids)
        longest = prompt + entry.sequence.budget
        return longest if self._crowded else min(longest, max(prompt, entry.sequence.frontier.length) + NEXT_TOKENS)

    def _make_room(self, error: MemoryFullError) -> Iterator[tuple[S, Event]]:
        entry = next((one for one in reversed(self._running) if not one.delivered), self._running[-1])
        self._running.remove(entry)
        if not self._running:
            self._fail(entry, error)
            return
        self._waiting.appendleft(entry)
        self._crowded = True
        self.observer.on_restart(entry.sequence)
        for event in entry.restart():
            yield entry.sequence, event

    def _fail(self, entry: _Entry[S], error: AdiError) -> None:
        self.failed[entry.sequence] = error
        self._drop(entry)

    def _serve(self) -> None:
        """Serve the needs of some sequences, those first that have waited longest."""
        longest = sorted(self._running, key=lambda entry: entry.served)
        heads = [(entry, entry.need) for entry in longest if isinstance(entry.need, HeadPass)]
        passes = [(entry, entry.need) for entry in longest if isinstance(entry.need, BlockPass)]
        rounds = [(entry, entry.need) for entry in longest if isinstance(entry.need, DraftRound)]
        if heads:
            replies = self._score(heads)
        elif rounds:
            replies = self._draft(rounds, [need for _, need in passes])
        else:
            replies = self._forward(passes) if passes else []
        now = 1 + max((entry.served for entry in longest), default=0)
        for entry, reply in replies:
            entry.need, entry.reply, entry.served = None, reply, now

    def _draft(
        self, waiting: Sequence[tuple[_Entry[S], DraftRound]], passes: Sequence[BlockPass]
    ) -> list[tuple[_Entry[S], Served]]:
        """The drafts of all that will share the next pass, beside rows that wait for it already."""
        spec = self.backbone.spec
        beside = rows_beside(spec, passes, len(waiting), self._pace)
        draft_together([item for _, item in waiting], beside, spec.merged_rows)
        return [(entry, Served(None)) for entry, _ in waiting]

    def _begin_round(self, chosen: Sequence[tuple[_Entry[S], BlockPass]]) -> None:
        trials = next((found for entry, _ in chosen if (found := entry.sequence.trials) is not None), None)
        answered = [(entry, need) for entry, need in chosen if trials is not None and not need.rows.prompt]
        positions = {entry: need.rows.start for entry, need in answered if entry.sequence.trials is not None}
        self._clock.begin(trials, positions, len(chosen) - len(positions))

    def _score(self, waiting: Sequence[tuple[_Entry[S], HeadPass]]) -> list[tuple[_Entry[S], Served]]:
        """One call of the head for all of them, where rows do not depend on each other; else, and where the logits of one hold
        no distribution, one for each."""
        alike = [(entry, head) for entry, head in waiting if head.logits == waiting[0][1].logits]
        chosen = [alike[i] for i in sharing([len(head.states) for _, head in alike], self.backbone.spec.merged_rows)]
        together: NoDistributionError | None = None
        if self.backbone.spec.row_invariant and len(chosen) > 1:
            try:
                return self._score_together(chosen)
            except NoDistributionError as error:
                together = error  # of some of them: the others have the same bits alone
        replies = []
        for entry, head in chosen:
            try:
                score, seconds = _timed(partial(head.run, self.backbone))
            except NoDistributionError as error:
                self._fail(entry, error)
                continue
            self.observer.on_scores(entry.sequence, head, score)
            replies.append((entry, Served(score, seconds, len(head.states))))
        if together is not None and len(replies) == len(chosen):
            raise together  # alone each has a distribution: a fault of the engine, whose rows depend on each other
        return replies

    def _score_together(self, chosen: Sequence[tuple[_Entry[S], HeadPass]]) -> list[tuple[_Entry[S], Served]]:
        merged = replace(chosen[0][1], states=States.joined([head.states for _, head in chosen]))
        scores, seconds = _timed(partial(merged.run, self.backbone))
        replies = []
        for (entry, head), end in zip(chosen, accumulate(len(head.states) for _, head in chosen), strict=True):
            score = scores[end - len(head.states) : end]
            self.observer.on_scores(entry.sequence, head, score)
            replies.append((entry, Served(score, seconds, len(merged.states))))
        return replies

    def _forward(self, waiting: Sequence[tuple[_Entry[S], BlockPass]]) -> list[tuple[_Entry[S], Served]]:
        """One pass for those that begin lowest or, in a later turn, with the same weights, as far as all of them go. A prompt's
        are the lowest only where there are no others, or these are patient: or they would wait until it is all read."""
        answered = [] if self._pace is None else [(entry, need) for entry, need in waiting if not begins_prompt(need)]
        lo = min(need.lo for _, need in answered or waiting)
        alike = beside(self.backbone.spec, lo, waiting)
        chosen = chosen_for(self.backbone.spec, alike, self._pace)
        if lo == 0:
            self._begin_round(chosen)
        hi = lo + min(need.hi - need.lo for _, need in chosen)
        mlp = any(entry.sequence.frontier.mlp for entry, _ in chosen)
        found, seconds = _timed(partial(self.backbone.forward, [need.rows for _, need in chosen], lo, hi, mlp=mlp))
        replies, rows = [], sum(len(need.rows.ids) for _, need in chosen)
        for (entry, need), states in zip(chosen, found, strict=True):
            done = replace(need, hi=hi - lo + need.lo)
            if not done.provisional:
                self.observer.on_pass(entry.sequence, done, states)
            replies.append((entry, Served((done, states), seconds, rows)))
        of_prompts = sum(len(need.rows.ids) for _, need in chosen if need.rows.prompt)
        if self._pace is not None and (others := sum(len(need.rows.ids) for _, need in chosen) - of_prompts):
            self._pace.seen(seconds, of_prompts, others)
        return replies


T = TypeVar("T")


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    start = perf_counter()
    return work(), perf_counter() - start
