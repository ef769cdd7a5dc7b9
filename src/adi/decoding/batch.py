"""``generate_batch``: many sequences, each at its own length and depth, in shared passes.

Every sequence is an ordinary ``Session``. The driver collects what they need next and meets it together: the passes that
begin at the lowest block first, so that sequences which lag catch up and share what lies above. Reading weights is most of
the cost of a pass over few rows, so eight sequences in one pass cost little more than one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from adi.decoding.frontier import Pass
from adi.decoding.policies import Policy
from adi.decoding.records import Event, Generation, Step
from adi.decoding.session import Score, Session
from adi.model.backbone import Backbone
from adi.model.checkpoint import Model
from adi.model.tokenizer import Prompt

MERGED_ROWS = 64  # a pass of more rows (a prompt) keeps the processor busy alone, and would make the others wait


@dataclass
class _Member:
    """A session in the batch, its steps so far and what it waits for."""

    session: Session
    work: Iterator[Pass | Score | Event]
    steps: list[Step] = field(default_factory=list)
    need: Pass | Score | None = None

    def go_on(self) -> bool:
        """Run to the next need; False when the text is finished."""
        for item in self.work:
            if isinstance(item, (Pass, Score)):
                self.need = item
                return True
            if isinstance(item, Step):
                self.steps.append(item)
        self.need = None
        return False


def generate_batch(
    model: Model,
    prompts: Sequence[Prompt],
    policy: Policy | None = None,
    *,
    max_new_tokens: int = 256,
    stop: str | Sequence[str] = (),
    stop_at_eos: bool = True,
    raw: bool = False,
    candidates: int = 0,
    most: int = 32,
) -> list[Generation]:
    """Generate for all prompts together; the results, in their order, are those of ``generate`` for each alone.

    On an engine whose rows do not depend on each other (``spec.row_invariant``) they are the same bit for bit, in every
    precision.

    Args:
        prompts: each as for ``generate``; none gives an empty list.
        most: so many sequences run at once at most; the others wait, and enter as texts end.
        model, policy, max_new_tokens, stop, stop_at_eos, raw, candidates: as for ``generate``.

    Raises:
        ValueError: before any work, for an option or a prompt that cannot be meant (the prompt is named by its index); and
            where KV memory is full: run fewer at once.
    """
    if most < 1:
        raise ValueError(f"most is {most}; it must be at least 1.")
    options = {"max_new_tokens": max_new_tokens, "stop_at_eos": stop_at_eos, "raw": raw, "candidates": candidates}
    members = []
    for i, prompt in enumerate(prompts):
        try:
            session = Session(model, prompt, policy, stop=stop, **options)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from None
        members.append(_Member(session, session.work()))
    waiting, active = deque(members), list[_Member]()
    try:
        while waiting or active:
            while waiting and len(active) < most:
                member = waiting.popleft()
                if member.go_on():
                    active.append(member)
            for member in _meet(model.backbone, active):
                if not member.go_on():
                    active.remove(member)
    finally:
        for member in members:
            member.work.close()  # type: ignore[attr-defined]
    return [member.session.generation(member.steps) for member in members]


def _meet(backbone: Backbone, active: Sequence[_Member]) -> list[_Member]:
    """Meet the needs of some members; those may go on."""
    scores = [(member, member.need) for member in active if isinstance(member.need, Score)]
    if scores:
        _score(backbone, scores)
        return [member for member, _ in scores]
    passes = [(member, member.need) for member in active if isinstance(member.need, Pass)]
    if not passes:
        return []
    lo = min(need.lo for _, need in passes)
    lowest = [(member, need) for member, need in passes if need.lo == lo]
    long = [pair for pair in lowest if len(pair[1].rows.ids) > MERGED_ROWS]
    chosen = long[:1] or lowest
    hi = min(need.hi for _, need in chosen)
    shown = any(member.session.frontier.mlp for member, _ in chosen)
    states = backbone.forward([need.rows for _, need in chosen], lo, hi, mlp=shown)
    for (member, need), left in zip(chosen, states, strict=True):
        member.session.answer((replace(need, hi=hi), left))
    return [member for member, _ in chosen]


def _score(backbone: Backbone, scores: Sequence[tuple[_Member, Score]]) -> None:
    """One call of the head for all of them, where rows do not depend on each other; else one for each."""
    import torch

    if not backbone.spec.row_invariant:
        for member, need in scores:
            member.session.answer(backbone.greedy(need.hidden_TD))
        return
    tokens = backbone.greedy(torch.cat([need.hidden_TD for _, need in scores]))
    for member, need in scores:
        count = need.hidden_TD.shape[0]
        member.session.answer(tokens[:count])
        tokens = tokens[count:]
