"""The four checks of one model at one precision: replay, greedy match, fault injection, sampling."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from adi.artifact import Exits
from adi.decoding.generate import generate
from adi.decoding.policies import FullDepth, Policy, Static, Verified
from adi.decoding.records import Counters
from adi.decoding.sampling import Sampling, prompt_seed
from adi.decoding.session import Session
from adi.errors import NoDistributionError
from adi.measure.audit.faults import Scripted, drive
from adi.measure.audit.match import Tally, divergence
from adi.measure.audit.replay import MOST, Replay, replay
from adi.measure.audit.sampling import TOKENS, Draws, Law, draws_of, likely_draft
from adi.model.load import Model

REPLAYED = 56  # positions: engines read longer prompts in another way than they decode
SHORT = 16  # tokens of the prompt after which tokens are drawn
DRAFTS = 5
Notice = Callable[[str], None]
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """How much is tried."""

    max_new_tokens: int
    draws: int
    seed: int


def policies_of(exits: Exits) -> dict[str, Policy]:
    """Ways of drafting: as a user of these exits would, from one exit whatever it shows, and from the text's own n-grams."""
    middle = exits.depths[len(exits.depths) // 2]
    return {
        "as the exits are": Verified(exits),
        f"always at depth {middle}": Static(exits, middle, DRAFTS),
        "memory of the text": Verified(),
    }


def check(model: Model, exits: Exits, prompts: Sequence[Ids], size: Size, notice: Notice) -> dict[str, Any]:
    """All checks of one loaded model, as plain values; ``violations`` are sentences.

    A model that stops giving numbers on the way is a violation too, and ends the checks.
    """
    spec = model.backbone.spec
    found: dict[str, Any] = {
        "backend": spec.backend,
        "precision": spec.precision,
        "row_invariant": spec.row_invariant,
        "noise": 0.0,
        **{name: [] for name in ("replay", "greedy", "sampling", "faults", "violations")},
    }
    checks = _Checks(model, exits, prompts, size, notice, found)
    try:
        checks.run()
    except NoDistributionError as error:
        found["violations"].append(f"{checks.where}: {error}")
    return found


@dataclass
class _Checks:
    """Fills in what was found, check by check."""

    model: Model
    exits: Exits
    prompts: Sequence[Ids]
    size: Size
    notice: Notice
    found: dict[str, Any]
    texts: list[Ids] = field(default_factory=list)  # full depth's, of each prompt
    noise: float = 0.0  # what a logit may be off by rounding

    @property
    def where(self) -> str:
        return f"{self.model.backbone.spec.backend} {self.model.backbone.spec.precision}"

    def run(self) -> None:
        policies = policies_of(self.exits)
        self.notice(f"{self.where}: full depth and replay")
        self.model.backbone.prepare((), drafts=True, wait=True)
        self.texts = [self._continued(ids, FullDepth(), self.size.max_new_tokens) for ids in self.prompts]
        replays = [self._replay(i) for i in range(len(self.prompts))]
        self.noise = max((one.noise for one in replays), key=lambda noise: (math.isnan(noise), noise))
        self.found["noise"] = self.noise if math.isfinite(self.noise) else None
        for i, one in enumerate(replays):
            self._report("replay", one, f": replay of prompt {i}")
        self.notice(f"{self.where}: greedy match")
        for name, policy in policies.items():
            self._report("greedy", self._greedy(name, policy))
        self.notice(f"{self.where}: fault injection")
        self._report("faults", self._scripted("random rejections", [None] * 3))
        self._report("faults", self._scripted("rollbacks to every length", range(DRAFTS + 1)))
        self._report("faults", self._interrupted(policies))
        self.notice(f"{self.where}: sampling")
        for draws in self._sampling(policies):
            self._report("sampling", draws)

    def _report(self, check: str, one: Replay | Tally | Draws, of: str = "") -> None:
        self.found[check].append(one.to_json())
        self.found["violations"] += one.violations(self.where + of)

    def _continued(self, ids: Ids, policy: Policy, tokens: int) -> Ids:
        return generate(self.model, ids, policy, max_new_tokens=tokens, stop_at_eos=False).token_ids

    def _count(self, tally: Tally, prompt: int, full: Ids, got: Ids, counters: Counters) -> None:
        tally.runs += 1
        tally.tokens += len(got)
        tally.drafted += counters.drafted
        tally.accepted += counters.accepted
        if (found := divergence(self.model, prompt, self.prompts[prompt], full, got, self.noise)) is not None:
            tally.divergences.append(found)

    def _replay(self, prompt: int) -> Replay:
        ids, context = self.prompts[prompt], self.model.backbone.spec.context
        whole = (ids + self.texts[prompt])[: REPLAYED if context is None else max(2, min(REPLAYED, context - MOST))]
        start = max(1, min(len(ids), len(whole) // 3))
        return replay(self.model.backbone, whole, start, self.exits.depths, self.size.seed + prompt)

    def _greedy(self, name: str, policy: Policy) -> Tally:
        tally = Tally(name)
        for i, (ids, text) in enumerate(zip(self.prompts, self.texts, strict=True)):
            got = generate(self.model, ids, policy, max_new_tokens=self.size.max_new_tokens, stop_at_eos=False)
            self._count(tally, i, text, got.token_ids, got.counters)
        return tally

    def _scripted(self, name: str, rights: Sequence[int | None]) -> Tally:
        """Scripted drafts: of each round's so many are right, None for a random number."""
        tally, dice = Tally(name), random.Random(self.size.seed)
        for i, (ids, text) in enumerate(zip(self.prompts, self.texts, strict=True)):
            for right in rights:
                truth, share = functools.partial(_next_of, (*ids, *text)), functools.partial(_right_drafts, right, dice)
                script = Scripted(truth, share, self.exits, DRAFTS, self.size.seed + i)
                session = Session(self.model, ids, script, max_new_tokens=len(text), stop_at_eos=False)
                self._count(tally, i, text, tuple(step.token for step in drive(session)), session.counters)
        return tally

    def _interrupted(self, policies: dict[str, Policy]) -> Tally:
        """Runs that end before a pass, or after one whose states are lost, and resume from the tokens that had come, as full
        depth resumes there: below float32 a prompt's long pass may round otherwise than the short ones of these tokens."""
        tally = Tally("interruptions")
        for i, (ids, text) in enumerate(zip(self.prompts, self.texts, strict=True)):
            resumed = {0: text, len(text): text}  # full depth's text, by how much of it was there when it was resumed
            for policy in policies.values():
                for passes in range(1, 7):
                    session = Session(self.model, ids, policy, max_new_tokens=len(text), stop_at_eos=False)
                    got = tuple(step.token for step in drive(session, passes, lost=bool(passes % 2)))
                    there, rest = len(got), len(text) - len(got)
                    if there not in resumed:
                        resumed[there] = (*text[:there], *self._continued((*ids, *text[:there]), FullDepth(), rest))
                    if rest:
                        got = (*got, *self._continued((*ids, *got), policy, rest))
                    self._count(tally, i, resumed[there], got, session.counters)
        return tally

    def _sampling(self, policies: dict[str, Policy]) -> list[Draws]:
        """Full depth, the user's own way of drafting, one exit always, and scripted drafts that full depth often accepts."""
        law = Law(self.model, self.prompts[0][:SHORT])

        def by(policy: Policy) -> Callable[[Sampling, int], Session]:
            return lambda sampling, _: self._sampled(law, policy, sampling)

        def scripted(sampling: Sampling, i: int) -> Session:
            right = functools.partial(_all_but, i % 4 // 3)
            return self._sampled(law, Scripted(likely_draft(law), right, self.exits, 2, i), sampling)

        ways = {"full depth": by(FullDepth()), **{name: by(policies[name]) for name in list(policies)[:2]}, "script": scripted}
        found, draws = [], self.size.draws
        for way, (name, make) in enumerate(ways.items()):
            seeds = [prompt_seed(self.size.seed, way * draws + i) for i in range(draws)]
            found.append(draws_of(law, name, make, drive, seeds, self.noise))
        return found

    def _sampled(self, law: Law, policy: Policy, sampling: Sampling) -> Session:
        return Session(self.model, law.ids, policy, sampling=sampling, max_new_tokens=TOKENS, stop_at_eos=False)


def _next_of(known: Ids, text: Sequence[int]) -> int:
    return known[len(text)]


def _right_drafts(right: int | None, dice: random.Random, most: int) -> int:
    return min(right, most) if right is not None else dice.randrange(most + 1)


def _all_but(wrong: int, most: int) -> int:
    return most - wrong
