"""``generate_batch``: many sequences, each at its own length and depth, in shared passes.

Every sequence is an ordinary ``Session``. The driver collects what they need next and meets it together: the passes that
begin at the lowest block first, so that sequences which lag catch up and share what lies above. Reading weights is most of
the cost of a pass over few rows, so eight sequences in one pass cost little more than one. Beyond some rows (64) a pass gains
nothing more, and its kernels have other bits than a text alone gets: the sequences that waited longest go first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from adi.decoding.checks import check_count
from adi.decoding.frontier import BlockPass, HeadPass
from adi.decoding.policies import Policy
from adi.decoding.records import Event, Generation, Step
from adi.decoding.sampling import Sampling
from adi.decoding.session import Session
from adi.errors import AdiError, MemoryFullError
from adi.model.backbone import Backbone, States
from adi.model.load import Model
from adi.model.tokenizer import Prompt

NEXT_TOKENS = 32  # of each text, for which KV memory should be free when another enters


class BatchMemoryError(MemoryFullError):
    """A text of a batch for which KV memory does not suffice even while no other runs.

    ``prompts`` are the indices of all such texts, ``finished`` the other texts of the batch by their indices.
    """

    def __init__(self, message: str, prompts: Sequence[int], finished: Mapping[int, Generation]) -> None:
        super().__init__(message)
        self.prompts, self.finished = tuple(prompts), dict(finished)


@dataclass(eq=False)
class _Member:
    """One prompt of the batch: its session, its steps so far and what it waits for."""

    index: int
    make: Callable[[], Session]
    session: Session
    work: Generator[BlockPass | HeadPass | Event, None, None] = field(init=False)
    steps: list[Step] = field(default_factory=list)
    need: BlockPass | HeadPass | None = None
    met: int = 0  # when a need of it was last met, by a clock of the batch

    def __post_init__(self) -> None:
        self.work = self.session.work()

    def go_on(self) -> bool:
        """Run to the next need; False when the text is finished."""
        for item in self.work:
            if isinstance(item, (BlockPass, HeadPass)):
                self.need = item
                return True
            if isinstance(item, Step):
                self.steps.append(item)
        self.need = None
        return False

    def start_over(self) -> None:
        """Give back all KV memory; a new session will say the same again, from its own seed too."""
        self.close()
        self.session, self.steps, self.need = self.make(), [], None
        self.work = self.session.work()

    def close(self) -> None:
        self.work.close()


@dataclass
class _Batch:
    """Who waits, who runs (in the order in which they entered) and who cannot.

    Where KV memory is full, the text that entered last makes room, those that have said nothing yet before others, and begins
    again later. From then on a text enters only where all that run may become as long as ``budget`` allows: so none begins
    again twice, and the oldest always goes on.
    """

    backbone: Backbone
    most: int
    budget: int
    waiting: deque[_Member]
    running: list[_Member] = field(default_factory=list)
    unfit: list[tuple[_Member, MemoryFullError]] = field(default_factory=list)
    crowded: bool = False

    def run(self) -> None:
        """Until nobody waits or runs."""
        while self.waiting or self.running:
            self._let_in()
            for member in self._met():
                if not member.go_on():
                    self.running.remove(member)

    def _met(self) -> list[_Member]:
        """The members whose needs were met, after as many as must have made room."""
        while True:
            try:
                return _meet(self.backbone, self.running)
            except MemoryFullError as error:  # before anything has run, so the needs stand
                self._make_room(error)

    def _let_in(self) -> None:
        while self.waiting and len(self.running) < self.most and self._has_room_for(self.waiting[0]):
            member = self.waiting.popleft()
            if member.go_on():
                self.running.append(member)

    def _has_room_for(self, member: _Member) -> bool:
        if not self.running:
            return True  # if it does not fit now, it never will
        return self.backbone.fits([(m.session.frontier.cache, self._length(m)) for m in (*self.running, member)])

    def _length(self, member: _Member) -> int:
        """How long a text may become before another one ends: while memory was never full, a guess."""
        prompt = len(member.session.prompt_ids)
        longest = prompt + self.budget
        return longest if self.crowded else min(longest, max(prompt, member.session.frontier.length) + NEXT_TOKENS)

    def _make_room(self, error: MemoryFullError) -> None:
        member = next((m for m in reversed(self.running) if not m.steps), self.running[-1])
        self.running.remove(member)
        if not self.running:
            member.close()
            self.unfit.append((member, error))
            return
        member.start_over()
        self.waiting.appendleft(member)
        self.crowded = True


def generate_batch(
    model: Model,
    prompts: Sequence[Prompt],
    policy: Policy | None = None,
    *,
    max_new_tokens: int = 256,
    stop: str | Sequence[str] = (),
    stop_at_eos: bool = True,
    raw: bool = False,
    special_tokens: bool = False,
    candidates: int = 0,
    most: int = 32,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> list[Generation]:
    """Generate for all prompts together; the results, in their order, are those of ``generate`` for each alone.

    On an engine whose rows do not depend on each other (``spec.row_invariant``) they are the same bit for bit, in every
    precision. Where KV memory is full, the texts that came last begin again when others have ended, which costs time only.

    Args:
        prompts: each as for ``generate``; none gives an empty list.
        most: so many sequences run at once at most; the others wait, and enter as texts end and KV memory is free.
        seed: each prompt draws with its own, ``prompt_seed(seed, its index)``: what ``generate`` says alone from that one.
        model, policy, max_new_tokens, stop, stop_at_eos, raw, special_tokens, candidates, temperature, top_k, top_p, min_p,
            repetition_penalty: as for ``generate``.

    Raises:
        ValueError: before any work, for an option or a prompt that cannot be meant (the prompt is named by its index); and,
            as ``BatchMemoryError`` with all other texts, where a text does not fit in KV memory even alone.
    """
    check_count("most", most, 1)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed).settled()
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop_at_eos": stop_at_eos, "raw": raw}
    options |= {"candidates": candidates, "special_tokens": special_tokens}
    members = []
    for i, prompt in enumerate(prompts):
        make = partial(Session, model, prompt, policy, stop=stop, sampling=sampling.of_prompt(i), **options)
        try:
            members.append(_Member(i, make, make()))
        except ValueError as error:
            raise AdiError(f"prompt {i}: {error}") from None
    batch = _Batch(model.backbone, most, max_new_tokens, deque(members))
    try:
        batch.run()
    finally:
        for member in members:
            member.close()
    unfit = [member.index for member, _ in batch.unfit]
    texts = {m.index: m.session.generation(m.steps) for m in members if m.index not in unfit}
    if unfit:
        raise BatchMemoryError(f"prompt {unfit[0]}: {batch.unfit[0][1]}", unfit, texts)
    return list(texts.values())


def sharing(counts: Sequence[int], most: int) -> list[int]:
    """The places of those that share a pass (or a call of the head): as many as fit in ``most`` rows together, the first ones
    before others, and the very first whatever it takes. At least one."""
    chosen: list[int] = []
    left = most
    for place, count in enumerate(counts):
        if not chosen or count <= left:
            chosen.append(place)
            left -= count
    return chosen


def _meet(backbone: Backbone, active: Sequence[_Member]) -> list[_Member]:
    """Meet the needs of some members, those first that have waited longest; these may go on."""
    waiting = sorted(active, key=lambda member: member.met)
    wished = [(member, member.need) for member in waiting if isinstance(member.need, HeadPass)]
    scores = [(member, need) for member, need in wished if need.whole == wished[0][1].whole]
    if scores:
        chosen_scores = [scores[i] for i in sharing([len(need.states) for _, need in scores], backbone.spec.merged_rows)]
        _score(backbone, chosen_scores)
        return _went_on(chosen_scores, active)
    passes = [(member, member.need) for member in waiting if isinstance(member.need, BlockPass)]
    if not passes:
        return []
    lo = min(need.lo for _, need in passes)
    lowest = [(member, need) for member, need in passes if need.lo == lo]
    chosen = [lowest[i] for i in sharing([len(need.rows.ids) for _, need in lowest], backbone.spec.merged_rows)]
    hi = min(need.hi for _, need in chosen)
    shown = any(member.session.frontier.mlp for member, _ in chosen)
    states = backbone.forward([need.rows for _, need in chosen], lo, hi, mlp=shown)
    for (member, need), left in zip(chosen, states, strict=True):
        member.session.answer((replace(need, hi=hi), left))
    return _went_on(chosen, active)


def _went_on(chosen: Sequence[tuple[_Member, BlockPass | HeadPass]], active: Sequence[_Member]) -> list[_Member]:
    now = 1 + max(member.met for member in active)
    for member, _ in chosen:
        member.met = now
    return [member for member, _ in chosen]


def _score(backbone: Backbone, scores: Sequence[tuple[_Member, HeadPass]]) -> None:
    """One call of the head for all of them, where rows do not depend on each other; else one for each."""
    if not backbone.spec.row_invariant:
        for member, need in scores:
            member.session.answer(need.met(backbone))
        return
    together = States.joined([need.states for _, need in scores])
    said = replace(scores[0][1], states=together).met(backbone)
    for member, need in scores:
        count = len(need.states)
        member.session.answer(said[:count])
        said = said[count:]
