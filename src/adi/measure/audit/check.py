"""The four checks of one model at one precision: replay, greedy match, fault injection, sampling."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from adi.artifact import Exits
from adi.decoding.generate import generate
from adi.decoding.policies import FullDepth, Policy, Static, Verified
from adi.decoding.records import Counters, Generation
from adi.decoding.sampling import Sampling, prompt_seed
from adi.decoding.session import Session
from adi.errors import NoDistributionError
from adi.measure.audit.faults import Scripted, drive
from adi.measure.audit.match import TextMatch, divergence
from adi.measure.audit.replay import MOST, Replay, replay
from adi.measure.audit.sampling import TOKENS, Draws, Law, draws_of, likely_draft
from adi.model.hub import Notice
from adi.model.load import Model

REPLAYED = 56  # positions: engines read longer prompts in another way than they decode
SHORT = 16  # tokens of the prompt after which tokens are drawn
DRAFTS = 5
Ids = tuple[int, ...]
Run = tuple[int, Ids, Ids, Counters]  # prompt, the text it must give, the text it gave


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
        "as the exits are": Verified(exits, None if exits.drafter is not None else exits.trigger),
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
        "precision": spec.numbers,
        "row_invariant": spec.row_invariant,
        "noise": 0.0,
        **{name: [] for name in ("replay", "greedy", "sampling", "faults", "violations")},
    }
    checks = _Checks(model.plain(), exits, prompts, size, notice, found)
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
        return f"{self.model.backbone.spec.backend} {self.model.backbone.spec.numbers}"

    def run(self) -> None:
        policies = policies_of(self.exits)
        self.notice(f"{self.where}: full depth and replay")
        self.model.backbone.prepare((), drafts=True, wait=True)
        self.texts = [self._generated(ids, FullDepth(), self.size.max_new_tokens).token_ids for ids in self.prompts]
        replays = [self._replay(i) for i in range(len(self.prompts))]
        self.noise = max((one.noise for one in replays), key=lambda noise: (math.isnan(noise), noise))
        self.found["noise"] = self.noise if math.isfinite(self.noise) else None
        for i, one in enumerate(replays):
            self._report("replay", one, f": replay of prompt {i}")
        self.notice(f"{self.where}: greedy match")
        for name, policy in policies.items():
            self._match("greedy", name, self._drafted(policy))
        self.notice(f"{self.where}: fault injection")
        self._match("faults", "random rejections", self._scripted([None] * 3))
        self._match("faults", "rollbacks to every length", self._scripted(range(DRAFTS + 1)))
        self._match("faults", "interruptions", self._interrupted(policies))
        self.notice(f"{self.where}: sampling")
        for draws in self._sampling(policies):
            self._report("sampling", draws)

    def _report(self, check: str, one: Replay | TextMatch | Draws, of: str = "") -> None:
        self.found[check].append(one.to_json())
        self.found["violations"] += one.violations(self.where + of)

    def _match(self, check: str, name: str, runs: Iterator[Run]) -> None:
        """Report the texts of these runs against those that they must give."""
        match = TextMatch(name)
        for prompt, full, got, counters in runs:
            match.runs += 1
            match.tokens += len(got)
            match.drafted += counters.drafted
            match.accepted += counters.accepted
            if (found := divergence(self.model, prompt, self.prompts[prompt], full, got, self.noise)) is not None:
                match.divergences.append(found)
        self._report(check, match)

    def _generated(self, ids: Ids, policy: Policy, tokens: int) -> Generation:
        return generate(self.model, ids, policy, max_new_tokens=tokens, stop_at_eos=False)

    def _replay(self, prompt: int) -> Replay:
        ids, context = self.prompts[prompt], self.model.backbone.spec.context
        whole = (ids + self.texts[prompt])[: REPLAYED if context is None else max(2, min(REPLAYED, context - MOST))]
        start = max(1, min(len(ids), len(whole) // 3))
        return replay(self.model.backbone, whole, start, self.exits.depths, self.size.seed + prompt)

    def _drafted(self, policy: Policy) -> Iterator[Run]:
        for i, (ids, text) in enumerate(zip(self.prompts, self.texts, strict=True)):
            got = self._generated(ids, policy, self.size.max_new_tokens)
            yield i, text, got.token_ids, got.counters

    def _scripted(self, rights: Sequence[int | None]) -> Iterator[Run]:
        """Scripted drafts: of each round's so many are right, None for a random number."""
        dice = random.Random(self.size.seed)

        def script(known: Ids, right: int | None, seed: int) -> Scripted:
            def right_of(most: int) -> int:
                return dice.randrange(most + 1) if right is None else min(right, most)

            return Scripted(lambda text: known[len(text)], right_of, self.exits, DRAFTS, seed)

        for i, (ids, text) in enumerate(zip(self.prompts, self.texts, strict=True)):
            for right in rights:
                policy = script((*ids, *text), right, self.size.seed + i)
                session = Session(self.model, ids, policy, max_new_tokens=len(text), stop_at_eos=False)
                yield i, text, tuple(step.token for step in drive(session)), session.counters

    def _interrupted(self, policies: dict[str, Policy]) -> Iterator[Run]:
        """Runs that end before a pass, or after one whose states are lost, and resume from the tokens that had come, as full
        depth resumes there: below float32 a prompt's long pass may round otherwise than the short ones of these tokens."""
        for i, (ids, text) in enumerate(zip(self.prompts, self.texts, strict=True)):
            resumed = {0: text, len(text): text}  # full depth's text, by how much of it was there when it was resumed
            for policy, passes in itertools.product(policies.values(), range(1, 7)):
                session = Session(self.model, ids, policy, max_new_tokens=len(text), stop_at_eos=False)
                got = tuple(step.token for step in drive(session, passes, lost=bool(passes % 2)))
                there, rest = len(got), len(text) - len(got)
                if there not in resumed:
                    resumed[there] = text[:there] + self._generated(ids + text[:there], FullDepth(), rest).token_ids
                if rest:
                    got += self._generated(ids + got, policy, rest).token_ids
                yield i, resumed[there], got, session.counters

    def _sampling(self, policies: dict[str, Policy]) -> list[Draws]:
        """Full depth, the user's own way of drafting, one exit always, and scripted drafts that full depth often accepts."""
        law = Law(self.model, self.prompts[0][:SHORT])

        def by(policy: Policy) -> Callable[[Sampling, int], Session]:
            return lambda sampling, _: self._sampled(law, policy, sampling)

        def scripted(sampling: Sampling, i: int) -> Session:
            wrong = i % 4 // 3
            return self._sampled(law, Scripted(likely_draft(law), lambda most: most - wrong, self.exits, 2, i), sampling)

        ways = {"full depth": by(FullDepth()), **{name: by(policies[name]) for name in list(policies)[:2]}, "script": scripted}
        found, draws = [], self.size.draws
        for way, (name, make) in enumerate(ways.items()):
            seeds = [prompt_seed(self.size.seed, way * draws + i) for i in range(draws)]
            found.append(draws_of(law, name, make, drive, seeds, self.noise))
        return found

    def _sampled(self, law: Law, policy: Policy, sampling: Sampling) -> Session:
        return Session(self.model, law.ids, policy, sampling=sampling, max_new_tokens=TOKENS, stop_at_eos=False)
