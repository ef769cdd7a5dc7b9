"""The ladder: memory, the drafter, full depth; a controller climbs only as far as costs and acceptance say.

One more way of proposing for ``sequence.speculate``, so full depth has the last word on every token here too.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from adi.decoding.controller import DraftChoice
from adi.decoding.speculate import (
    DepthOutput,
    DraftStep,
    DraftToken,
    Forward,
    Proposing,
    Request,
    SequenceLogic,
    Yields,
    speculate,
)
from adi.drafters.ngram import NgramIndex, NgramMatch


class NgramSource(Protocol):
    """A memory beside the text's own; ``exits.habits.History`` is one."""

    def find(self, text: Sequence[int], most: int) -> NgramMatch | None: ...


@dataclass
class NgramSources:
    """The text's own memory, and others beside it."""

    others: Sequence[NgramSource] = ()
    text: NgramIndex | None = field(default_factory=NgramIndex)

    def find(self, text: Sequence[int], most: int) -> list[NgramMatch]:
        """What each of them says comes next, where it says anything."""
        said = [past.find(text, most) for past in ((self.text,) if self.text is not None else ()) + tuple(self.others)]
        return [recall for recall in said if recall is not None]


class Decides(Protocol):
    """Who drafts, and how far; ``decoding.controller.Controller`` is one."""

    @property
    def drafts(self) -> int: ...

    def stand(self, length: int) -> None: ...

    def choose(self, recalls: Sequence[NgramMatch], drafter: bool, most: int) -> DraftChoice: ...

    def goes_on(self, confidences: Sequence[float]) -> bool: ...

    def judged(self, choice: DraftChoice, confidences: Sequence[float], drafts: int, agreed: int) -> None: ...


@dataclass(frozen=True)
class FixedLength:
    """No controller: so many steps of the drafter in every round, come what may. What a controller has to beat."""

    drafts: int

    def stand(self, length: int) -> None:
        """It does not matter to it where the text is."""

    def choose(self, recalls: Sequence[NgramMatch], drafter: bool, most: int) -> DraftChoice:
        """The drafter, where there is room for a draft."""
        return DraftChoice("drafter", most) if most else DraftChoice("full")

    def goes_on(self, confidences: Sequence[float]) -> bool:
        """Whatever they are."""
        return len(confidences) < self.drafts

    def judged(self, choice: DraftChoice, confidences: Sequence[float], drafts: int, agreed: int) -> None:
        """It learns nothing."""


def ladder(plan: Request, controller: Decides, memory: NgramSources, drafter: bool) -> SequenceLogic:
    """Rounds in which whoever the controller names drafts, and full depth verifies."""
    rungs = Ladder(plan, controller, memory, drafter)
    return speculate(plan, controller.drafts, rungs.propose, rungs.hear)


@dataclass
class Ladder:
    """``propose`` for rounds; what it remembers between them is what the controller must be told."""

    plan: Request
    controller: Decides
    memory: NgramSources
    drafter: bool
    _tried: tuple[DraftChoice, list[float], int] | None = None

    def propose(self, text: Sequence[int], most: int) -> Proposing:
        self.controller.stand(len(text))
        choice = self.controller.choose(self.memory.find(text, most), self.drafter, most)
        drafts: list[DraftToken] = []
        confidences: list[float] = []
        if choice.recall is not None:
            remembered = self._up_to_the_end(choice.recall.tokens[: choice.drafts])
            drafts = [DraftToken(token, 0, (), "memory") for token in remembered]
            yield from drafts
        elif choice.level == "drafter":
            confidences = yield from self._guess(text, drafts, most)
        rows = (text[-1], *(d.token for d in drafts if not self.plan.ends(d.token)))
        readings = yield Forward(len(text) - 1, rows, self.plan.layers, len(rows))
        self._tried = (choice, confidences, len(drafts))
        return drafts, (), readings

    def hear(self, agreed: int) -> None:
        """So many drafts of the last proposal stand."""
        assert self._tried is not None
        choice, confidences, drafts = self._tried
        if drafts:
            self.controller.judged(choice, confidences, drafts, agreed)

    def _guess(
        self, text: Sequence[int], drafts: list[DraftToken], most: int
    ) -> Generator[Yields, Sequence[DepthOutput], list[float]]:
        """Draft by the network, one token at a time, while the controller finds it worth its while; how sure each was."""
        confidences: list[float] = []
        last = text[-1]
        while True:
            (reading,) = yield DraftStep(last, len(text) - 1, fresh=not drafts)
            last = reading.token
            confidences.append(reading.signals["top_probability"])
            drafts.append(DraftToken(last, 0, (), "drafter", confidences[-1]))
            yield drafts[-1]
            if self.plan.ends(last) or len(drafts) >= most or not self.controller.goes_on(confidences):
                return confidences

    def _up_to_the_end(self, tokens: Sequence[int]) -> list[int]:
        """Nothing follows a token that ends the text."""
        end = next((i + 1 for i, token in enumerate(tokens) if self.plan.ends(token)), len(tokens))
        return list(tokens[:end])
