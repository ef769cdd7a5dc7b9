"""The four checks of one model at one precision, and what of them is a violation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from adi.decoding.policies import FullDepth, Policy, Verified
from adi.decoding.sampling import Sampling, prompt_seed
from adi.decoding.session import Session
from adi.decoding.stream import generate
from adi.exits.artifact import Exits
from adi.exits.triggers import Always
from adi.measure.audit.faults import Scripted, drive
from adi.measure.audit.replay import MOST, Replay, replay
from adi.measure.audit.sampling import TOKENS, Drawing, Law, draws_of, likely_draft
from adi.measure.audit.ties import Divergence, divergence
from adi.model.checkpoint import Model

REPLAYED = 56  # positions: engines read longer prompts in another way than they decode
SHORT = 16  # tokens of the prompt after which tokens are drawn
DRAFTS = 5
Notice = Callable[[str], None]


@dataclass(frozen=True)
class Size:
    """How much is tried."""

    max_new_tokens: int
    draws: int
    seed: int


@dataclass
class Tally:
    """Runs that had to say what full depth says."""

    name: str
    runs: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    divergences: list[Divergence] = field(default_factory=list)

    @property
    def within(self) -> bool:
        return all(d.explained for d in self.divergences)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "within": self.within}


def policies_of(exits: Exits) -> dict[str, Policy]:
    """Ways of drafting: as a user of these exits would, from exits whatever they say, and from the text's own memory."""
    middle = exits.depths[len(exits.depths) // 2]
    return {
        "as the exits are": Verified(exits),
        f"always at depth {middle}": Verified(exits, Always((middle,)), draft_tokens=DRAFTS),
        "memory of the text": Verified(),
    }


def check(model: Model, exits: Exits, prompts: Sequence[tuple[int, ...]], size: Size, notice: Notice) -> dict[str, Any]:
    """All checks of one loaded model, as plain values; ``violations`` are sentences."""
    spec = model.backbone.spec
    notice(f"{spec.backend} {spec.precision}: full depth and replay")
    policies = policies_of(exits)
    model.backbone.prepare((), drafts=True, wait=True)
    texts = [generate(model, ids, max_new_tokens=size.max_new_tokens, stop_at_eos=False).token_ids for ids in prompts]
    replayed = [
        _replay(model, exits, ids, text, size.seed + i) for i, (ids, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    noise = max(found.noise for found in replayed)
    notice(f"{spec.backend} {spec.precision}: greedy match")
    greedy = [_greedy(model, name, policy, prompts, texts, size, noise) for name, policy in policies.items()]
    notice(f"{spec.backend} {spec.precision}: fault injection")
    faults = [
        _faults(model, exits, kind, prompts, texts, size, noise) for kind in ("random rejections", "rollbacks to every length")
    ]
    faults.append(_interrupted(model, policies, prompts, texts, size, noise))
    notice(f"{spec.backend} {spec.precision}: sampling")
    drawings = _sampling(model, exits, policies, prompts[0], size, noise)
    value = {
        "backend": spec.backend,
        "precision": spec.precision,
        "row_invariant": spec.row_invariant,
        "noise": noise,
        "replay": [_replay_json(found) for found in replayed],
        "greedy": [tally.to_json() for tally in greedy],
        "sampling": [{**asdict(d), "within": d.within} for d in drawings],
        "faults": [tally.to_json() for tally in faults],
    }
    return {
        **value,
        "violations": list(_violations(f"{spec.backend} {spec.precision}", replayed, [*greedy, *faults], drawings)),
    }


def _replay(model: Model, exits: Exits, ids: tuple[int, ...], text: tuple[int, ...], seed: int) -> Replay:
    context = model.backbone.spec.context
    whole = (ids + text)[: REPLAYED if context is None else max(2, min(REPLAYED, context - MOST))]
    return replay(model.backbone, whole, max(1, min(len(ids), len(whole) // 3)), exits.depths, seed)


def _replay_json(found: Replay) -> dict[str, Any]:
    drifts = [{**asdict(d), "allowed": d.allowed, "within": d.within} for d in found.drifts]
    return {
        "positions": found.positions,
        "rollbacks": {str(k): v for k, v in sorted(found.rollbacks.items())},
        "drifts": drifts,
    }


def _greedy(
    model: Model,
    name: str,
    policy: Policy,
    prompts: Sequence[tuple[int, ...]],
    texts: Sequence[tuple[int, ...]],
    size: Size,
    noise: float,
) -> Tally:
    tally = Tally(name)
    for i, (ids, text) in enumerate(zip(prompts, texts, strict=True)):
        got = generate(model, ids, policy, max_new_tokens=size.max_new_tokens, stop_at_eos=False)
        _count(tally, model, i, ids, text, got.token_ids, got.counters.drafted, got.counters.accepted, noise)
    return tally


def _count(
    tally: Tally,
    model: Model,
    prompt: int,
    ids: Sequence[int],
    full: Sequence[int],
    said: Sequence[int],
    drafted: int,
    accepted: int,
    noise: float,
) -> None:
    tally.runs += 1
    tally.tokens += len(said)
    tally.drafted += drafted
    tally.accepted += accepted
    if (found := divergence(model, prompt, ids, full, said, noise)) is not None:
        tally.divergences.append(found)


def _faults(
    model: Model,
    exits: Exits,
    kind: str,
    prompts: Sequence[tuple[int, ...]],
    texts: Sequence[tuple[int, ...]],
    size: Size,
    noise: float,
) -> Tally:
    """Scripted drafts: right for a random number of tokens, or for each number from none to all of them in turn."""
    tally, dice = Tally(kind), random.Random(size.seed)
    lengths = range(DRAFTS + 1) if kind == "rollbacks to every length" else [-1] * 3
    for i, (ids, text) in enumerate(zip(prompts, texts, strict=True)):
        known = (*ids, *text)
        for right in lengths:
            session = Scripted(
                model,
                ids,
                lambda said, known=known: known[len(said)],  # type: ignore[misc]
                lambda most, right=right: min(right, most) if right >= 0 else dice.randrange(most + 1),  # type: ignore[misc]
                depths=exits.depths,
                drafts=DRAFTS,
                seed=size.seed + i,
                max_new_tokens=len(text),
            )
            said = [step.token for step in drive(session)]
            _count(tally, model, i, ids, text, said, session.counters.drafted, session.counters.accepted, noise)
    return tally


def _interrupted(
    model: Model,
    policies: dict[str, Policy],
    prompts: Sequence[tuple[int, ...]],
    texts: Sequence[tuple[int, ...]],
    size: Size,
    noise: float,
) -> Tally:
    """Runs that end before a pass, or after one whose states are lost, and go on from the tokens that had come, as full depth
    goes on from there: below float32 a prompt's long pass may round otherwise than the short ones that made these tokens."""
    tally = Tally("interruptions")
    for i, (ids, text) in enumerate(zip(prompts[:2], texts, strict=False)):
        known = {0: tuple(text), len(text): tuple(text)}  # full depth's text, by how much of it was there when it went on
        for policy in policies.values():
            for passes in range(1, 7):
                session = Session(model, list(ids), policy, max_new_tokens=len(text), stop_at_eos=False)
                said = [step.token for step in drive(session, passes, lost=bool(passes % 2))]
                rest = len(text) - len(said)
                if rest:
                    after = [*ids, *said]
                    if (there := len(said)) not in known:
                        full = generate(model, [*ids, *text[:there]], max_new_tokens=rest, stop_at_eos=False).token_ids
                        known[there] = (*text[:there], *full)
                    said += generate(model, after, policy, max_new_tokens=rest, stop_at_eos=False).token_ids
                wanted = known[len(text) - rest]
                _count(tally, model, i, ids, wanted, said, session.counters.drafted, session.counters.accepted, noise)
    return tally


def _sampling(
    model: Model, exits: Exits, policies: dict[str, Policy], ids: tuple[int, ...], size: Size, noise: float
) -> list[Drawing]:
    """The user's own way of drafting, exits always, and scripted drafts that full depth often takes."""
    law = Law(model, ids[:SHORT])
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "stop_at_eos": False}

    def by(policy: Policy) -> Callable[[Sampling, int], Session]:
        return lambda sampling, _: Session(model, list(law.ids), policy, sampling=sampling, **options)

    def scripted(sampling: Sampling, i: int) -> Session:
        rest: dict[str, Any] = {"depths": exits.depths, "drafts": 2, "seed": i, "max_new_tokens": TOKENS}
        return Scripted(model, law.ids, likely_draft(law), lambda most: most - i % 4 // 3, sampling=sampling, **rest)

    ways = {
        "full depth": by(FullDepth()),
        **{name: by(policy) for name, policy in list(policies.items())[:2]},
        "script": scripted,
    }
    found = []
    for way, (name, make) in enumerate(ways.items()):
        seeds = [prompt_seed(size.seed, way * size.draws + i) for i in range(size.draws)]
        found.append(draws_of(law, name, make, drive, seeds, noise))
    return found


def _violations(where: str, replayed: Sequence[Replay], tallies: Sequence[Tally], drawings: Sequence[Drawing]) -> list[str]:
    """Sentences; none where all is as promised."""
    said = []
    for i, found in enumerate(replayed):
        for drift in found.drifts:
            if not drift.within:
                text = f"{drift.of} at depth {drift.depth} are off by {drift.drafted:.2g}, {drift.allowed:.2g} is allowed"
                said.append(f"{where}: replay of prompt {i}: {text}")
    for tally in tallies:
        for gap in tally.divergences:
            if not gap.explained:
                text = f"prompt {gap.prompt} parts from full depth at token {gap.at} ({gap.said} for {gap.full}), no tie"
                said.append(f"{where}: {tally.name}: {text} (gap {gap.gap:.2g}, noise {gap.noise:.2g})")
    for d in drawings:
        if d.variation > d.band:
            said.append(
                f"{where}: draws with drafts by {d.drafts!r} are {d.variation:.3f} off their law, {d.band:.3f} is allowed"
            )
        if (odd := d.draws - d.foreseen - d.near) > 0:
            said.append(f"{where}: {odd} of {d.draws} draws with drafts by {d.drafts!r} are not what their seeds say")
    return said
