"""One sequence's decoding logic: propose, verify, accept, roll back.

Written once, as generators that yield what they need next (an ``Forward``: go back to here, append these tokens, bring
all rows to that depth, read the last so many) and are sent the readings. They never call a model, so a driver may run one
of them or merge the requests of many, and a test may answer from a script. Between requests they yield what has happened.

Greedy verification after Stern et al. 2018 (blockwise parallel decoding) and Leviathan et al. 2023 (speculative decoding);
the draft is the same network, stopped early, and the frontier keeps what it computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from adi.exits.triggers import Trigger

if TYPE_CHECKING:
    from torch import Tensor


class DepthOutput(Protocol):
    """What one row shows at one depth; ``exits.exit_output.ExitOutput`` is the real one."""

    @property
    def depth(self) -> int: ...
    @property
    def token(self) -> int: ...
    @property
    def signals(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Forward:
    """A request: keep the first ``keep`` positions, append ``ids``, bring all rows to depth ``to``, read the last ``read``."""

    keep: int
    ids: tuple[int, ...]
    to: int
    read: int = 1


@dataclass(frozen=True)
class DraftStep:
    """A request: what the drafter expects after the token ``after``, which has entered no block. ``fresh``: it starts from the
    deep state of the last of ``known`` positions, else from what it gave itself the time before."""

    after: int
    known: int
    fresh: bool


@dataclass(frozen=True)
class ExitCheck:
    """One depth looked at on the way: its reading, and whether the trigger believed it."""

    reading: DepthOutput
    fired: bool


@dataclass(frozen=True)
class DraftToken:
    """A token put forward, with every depth looked at for it; the last is the one that was believed.

    ``depth`` 0 and no glance: no block ran for it; ``level`` says whether a "memory" or the "drafter" said it, the latter with
    a ``confidence``, its probability there. ``density_V`` is what it was drawn from, None where nothing was left to chance.
    """

    token: int
    depth: int
    glances: tuple[ExitCheck, ...]
    level: str = "exit"
    confidence: float | None = None
    density_V: Tensor | None = None


@dataclass(frozen=True)
class Emitted:
    """A token that is final. ``draft`` is what it was drafted as, ``rejected`` the drafts that it puts an end to."""

    token: int
    depth: int
    glances: tuple[ExitCheck, ...]
    round: int
    draft: DraftToken | None = None
    rejected: tuple[DraftToken, ...] = ()


Yields = Forward | DraftStep | DraftToken | Emitted
SequenceLogic = Generator[Yields, Sequence[DepthOutput], None]
Proposal = tuple[list[DraftToken], tuple[ExitCheck, ...], Sequence[DepthOutput]]
Proposing = Generator[Yields, Sequence[DepthOutput], Proposal]


class Rule(Protocol):
    """The token that follows ``text``, of which ``reading`` is the last row; where one was drafted, it stands if it is that.

    ``likeliest`` here is greedy; ``drawing.Sampler`` draws. It is asked once for every final token, in order.
    """

    def __call__(self, text: Sequence[int], reading: DepthOutput, draft: DraftToken | None = None, /) -> int: ...


def likeliest(text: Sequence[int], reading: DepthOutput, draft: DraftToken | None = None, /) -> int:
    """Greedy: whatever is likeliest."""
    return reading.token


@dataclass(frozen=True)
class Request:
    """What both ways of decoding need to know. ``stops`` are the depths to look at, ``ends`` says which tokens end it, ``rule``
    how a final token comes of what was read."""

    prompt: tuple[int, ...]
    budget: int
    layers: int
    stops: tuple[int, ...]
    trigger: Trigger
    ends: Callable[[int], bool]
    rule: Rule = likeliest


def early_exit(
    plan: Request, keep: int, ids: tuple[int, ...]
) -> Generator[Yields, Sequence[DepthOutput], tuple[ExitCheck, ...]]:
    """Append ``ids`` and go up from stop to stop until the trigger believes one; nothing is computed twice."""
    glances: list[ExitCheck] = []
    for stop in plan.stops:
        (reading,) = yield Forward(keep, ids, stop)
        keep, ids = keep + len(ids), ()
        glances.append(ExitCheck(reading, plan.trigger.fires(reading.signals, stop)))
        if glances[-1].fired:
            break
    return tuple(glances)


def decode_unverified(plan: Request) -> SequenceLogic:
    """Whatever the trigger believes stands; where it believes nothing, full depth decides.

    Without stops this is ordinary decoding, with them reflex decoding. Layers that were skipped fill themselves, exactly,
    when a later token goes deeper.
    """
    (reading,) = yield Forward(0, plan.prompt, plan.layers)
    text, rounds = [*plan.prompt, plan.rule(plan.prompt, reading)], 1
    yield Emitted(text[-1], plan.layers, (ExitCheck(reading, False),), 1)
    for _ in range(plan.budget - 1):
        if plan.ends(text[-1]):
            return
        glances = yield from early_exit(plan, len(text) - 1, (text[-1],))
        if not (glances and glances[-1].fired):
            rest = (text[-1],) if not glances else ()
            (reading,) = yield Forward(len(text) - len(rest), rest, plan.layers)
            glances = (*glances, ExitCheck(reading, False))
            rounds += 1
        token, depth = plan.rule(text, glances[-1].reading), glances[-1].reading.depth
        text.append(token)
        draft = DraftToken(token, depth, glances) if depth < plan.layers else None
        yield Emitted(token, depth, glances, rounds, draft)


def verified(plan: Request, draft_tokens: int) -> SequenceLogic:
    """Draft a block at exits, verify it in one pass, keep what full depth agrees with, add the token it gives next."""
    return speculate(plan, draft_tokens, functools.partial(_propose_and_verify, plan))


def speculate(
    plan: Request,
    draft_tokens: int,
    propose: Callable[[Sequence[int], int], Proposing],
    hear: Callable[[int], None] = lambda agreed: None,
) -> SequenceLogic:
    """Rounds of at most ``draft_tokens`` drafts, whoever makes them; full depth has the last word on every token.

    ``propose(text, most)`` gets all final tokens, of which the last has not entered the network. It gives at most ``most``
    drafts, the glances of a last token that found no believer, and full depth's reading at every row. ``hear`` is told how
    many of them stand.
    """
    (reading,) = yield Forward(0, plan.prompt, plan.layers)
    text, rounds = [*plan.prompt, plan.rule(plan.prompt, reading)], 1
    yield Emitted(text[-1], plan.layers, (ExitCheck(reading, False),), 1)
    while (left := plan.budget - len(text) + len(plan.prompt)) > 0 and not plan.ends(text[-1]):
        rounds += 1
        drafts, silent, readings = yield from propose(text, min(draft_tokens, left - 1))
        decided = _judged(plan, text, drafts, silent, readings, rounds)
        hear(sum(said.draft is not None for said in decided))
        text.extend(said.token for said in decided)
        yield from decided


def _judged(
    plan: Request,
    text: Sequence[int],
    drafts: Sequence[DraftToken],
    silent: tuple[ExitCheck, ...],
    readings: Sequence[DepthOutput],
    rounds: int,
) -> list[Emitted]:
    """The drafts that stand and the token that full depth gives after them: none where a draft ended the text and stands."""
    known, decided = list(text), list[Emitted]()
    for place, reading in enumerate(readings):
        draft = drafts[place] if place < len(drafts) else None
        token = plan.rule(known, reading, draft)
        glances = (*(silent if draft is None else draft.glances), ExitCheck(reading, False))
        if draft is None or token != draft.token:
            return [*decided, Emitted(token, plan.layers, glances, rounds, None, tuple(drafts[place:]))]
        decided.append(Emitted(token, draft.depth, glances, rounds, draft))
        known.append(token)
    return decided


def _propose_and_verify(plan: Request, text: Sequence[int], most: int) -> Proposing:
    """Drafts from exits."""
    drafts: list[DraftToken] = []
    end = len(text) - 1
    row: tuple[int, ...] = (text[-1],)  # the token that has not entered the network yet
    while len(drafts) < most and not (drafts and plan.ends(drafts[-1].token)):
        glances = yield from early_exit(plan, end, row)
        if glances:
            end, row = end + 1, ()
        if not (glances and glances[-1].fired):
            readings = yield Forward(end, row, plan.layers, len(drafts) + 1)
            return drafts, glances, readings
        drafts.append(DraftToken(glances[-1].reading.token, glances[-1].reading.depth, glances))
        row = (drafts[-1].token,)
        yield drafts[-1]
    if drafts and plan.ends(drafts[-1].token):
        row = ()  # nothing follows an ending, so it need not enter the network
    readings = yield Forward(end, row, plan.layers, len(drafts) + len(row))
    return drafts, (), readings
