"""The four checks of one model at one precision."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from adi.artifact import Exits
from adi.decoding.generate import generate
from adi.decoding.policies import FullDepth, Policy, Verified
from adi.decoding.sampling import Sampling, prompt_seed
from adi.decoding.session import Session
from adi.errors import NoDistributionError
from adi.exits.triggers import Always
from adi.measure.audit.faults import Scripted, drive
from adi.measure.audit.match import Tally, divergence
from adi.measure.audit.replay import MOST, Replay, replay
from adi.measure.audit.sampling import TOKENS, Draws, Law, draws_of, likely_draft
from adi.model.load import Model

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


def policies_of(exits: Exits) -> dict[str, Policy]:
    """Ways of drafting: as a user of these exits would, from exits whatever they say, and from the text's own memory."""
    middle = exits.depths[len(exits.depths) // 2]
    return {
        "as the exits are": Verified(exits),
        f"always at depth {middle}": Verified(exits, Always((middle,)), draft_tokens=DRAFTS),
        "memory of the text": Verified(),
    }


def check(model: Model, exits: Exits, prompts: Sequence[tuple[int, ...]], size: Size, notice: Notice) -> dict[str, Any]:
    """All checks of one loaded model, as plain values; ``violations`` are sentences.

    A model that stops giving numbers on the way is a violation too, and ends the checks.
    """
    spec = model.backbone.spec
    where = f"{spec.backend} {spec.precision}"
    found: dict[str, Any] = {
        "backend": spec.backend,
        "precision": spec.precision,
        "row_invariant": spec.row_invariant,
        "noise": 0.0,
        "replay": [],
        "greedy": [],
        "sampling": [],
        "faults": [],
        "violations": [],
    }
    try:
        _checks(found, where, model, exits, prompts, size, lambda stage: notice(f"{where}: {stage}"))
    except NoDistributionError as error:
        found["violations"].append(f"{where}: {error}")
    return found


def _checks(
    found: dict[str, Any],
    where: str,
    model: Model,
    exits: Exits,
    prompts: Sequence[tuple[int, ...]],
    size: Size,
    notice: Notice,
) -> None:
    """Fill in what was found, check by check."""
    notice("full depth and replay")
    policies = policies_of(exits)
    model.backbone.prepare((), drafts=True, wait=True)
    options: dict[str, Any] = {"max_new_tokens": size.max_new_tokens, "stop_at_eos": False}
    texts = [generate(model, ids, FullDepth(), **options).token_ids for ids in prompts]
    replayed = [
        _replay(model, exits, ids, text, size.seed + i) for i, (ids, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    noise = max((one.noise for one in replayed), key=lambda size: (math.isnan(size), size))
    found |= {"noise": noise if math.isfinite(noise) else None, "replay": [one.to_json() for one in replayed]}
    found["violations"] += [v for i, one in enumerate(replayed) for v in one.violations(f"{where}: replay of prompt {i}")]
    notice("greedy match")
    greedy = [_greedy(model, name, policy, prompts, texts, size, noise) for name, policy in policies.items()]
    found["greedy"] = [tally.to_json() for tally in greedy]
    found["violations"] += [v for tally in greedy for v in tally.violations(where)]
    notice("fault injection")
    kinds = ("random rejections", "rollbacks to every length")
    faults = [_faults(model, exits, kind, prompts, texts, size, noise) for kind in kinds]
    faults.append(_interrupted(model, policies, prompts, texts, size, noise))
    found["faults"] = [tally.to_json() for tally in faults]
    found["violations"] += [v for tally in faults for v in tally.violations(where)]
    notice("sampling")
    drawings = _sampling(model, exits, policies, prompts[0], size, noise)
    found["sampling"] = [draws.to_json() for draws in drawings]
    found["violations"] += [v for draws in drawings for v in draws.violations(where)]


def _replay(model: Model, exits: Exits, ids: tuple[int, ...], text: tuple[int, ...], seed: int) -> Replay:
    context = model.backbone.spec.context
    whole = (ids + text)[: REPLAYED if context is None else max(2, min(REPLAYED, context - MOST))]
    return replay(model.backbone, whole, max(1, min(len(ids), len(whole) // 3)), exits.depths, seed)


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


def _next_of(known: Sequence[int], said: Sequence[int]) -> int:
    return known[len(said)]


def _right_drafts(right: int, dice: random.Random, most: int) -> int:
    """So many of a round's drafts are right; below 0, a random number."""
    return min(right, most) if right >= 0 else dice.randrange(most + 1)


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
            truth, share = functools.partial(_next_of, known), functools.partial(_right_drafts, right, dice)
            script = Scripted(truth, share, exits.depths, DRAFTS, size.seed + i)
            session = Session(model, list(ids), script, max_new_tokens=len(text), stop_at_eos=False)
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

    def continued(after: Sequence[int], policy: Policy, tokens: int) -> tuple[int, ...]:
        return generate(model, after, policy, max_new_tokens=tokens, stop_at_eos=False).token_ids

    tally = Tally("interruptions")
    for i, (ids, text) in enumerate(zip(prompts, texts, strict=True)):
        known = {0: tuple(text), len(text): tuple(text)}  # full depth's text, by how much of it was there when it went on
        for policy in policies.values():
            for passes in range(1, 7):
                session = Session(model, list(ids), policy, max_new_tokens=len(text), stop_at_eos=False)
                said = [step.token for step in drive(session, passes, lost=bool(passes % 2))]
                rest = len(text) - len(said)
                if rest:
                    after = [*ids, *said]
                    if (there := len(said)) not in known:
                        known[there] = (*text[:there], *continued([*ids, *text[:there]], FullDepth(), rest))
                    said += continued(after, policy, rest)
                wanted = known[len(text) - rest]
                _count(tally, model, i, ids, wanted, said, session.counters.drafted, session.counters.accepted, noise)
    return tally


def _sampling(
    model: Model, exits: Exits, policies: dict[str, Policy], ids: tuple[int, ...], size: Size, noise: float
) -> list[Draws]:
    """The user's own way of drafting, exits always, and scripted drafts that full depth often takes."""
    law = Law(model, ids[:SHORT])
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "stop_at_eos": False}

    def by(policy: Policy) -> Callable[[Sampling, int], Session]:
        return lambda sampling, _: Session(model, list(law.ids), policy, sampling=sampling, **options)

    def scripted(sampling: Sampling, i: int) -> Session:
        script = Scripted(likely_draft(law), lambda most: most - i % 4 // 3, exits.depths, 2, i)
        return Session(model, list(law.ids), script, sampling=sampling, **options)

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
