"""Texts about a small world, in which some questions come back a known number of times.

In the world each of 5 relations leads from every name to another one. A sentence is a question and its answer, "ann teacher
neighbour bob": a name, 1 to 4 relations (hops), and where they lead, so an answer can be worked out hop by hop. Most questions
are drawn anew. An *item* is a question that comes as often as its level says, at dates drawn uniformly, and else never, nor
as the beginning of another one. Items of one hop have relations of their own, which lead nowhere further: those can only be
remembered. Levels are dealt at random; from seed to seed the same items change levels.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from adi.errors import UsageError
from adi.tasks.pointers import NONE
from adi.tasks.products import Batch

NAMES, RELATIONS, LONE, LENGTH, MOST_HOPS = 40, 5, 5, 40, 4
VOCABULARY = 1 + NAMES + RELATIONS + LONE  # id 0 pads
HOPS = (1, 2, 3, 4) * 6  # of the items of each level
REPEATED = 0.15  # share of sentences that repeat one of the same text
MOST_ASKED = 4  # items in one text

Key = tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """A question, its answer, how many texts ask it in training, and whether its answer is kept out of the loss."""

    key: Key
    answer: int
    exposures: int
    masked: bool = False

    @property
    def hops(self) -> int:
        return len(self.key) - 1


@dataclass
class Text:
    """Ids and labels (answers at their own place, -100 for none), and the place at which each sentence's answer is due."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    due: list[int] = field(default_factory=list)

    def say(self, key: Key, answers: Sequence[int], masked: bool = False) -> bool:
        """Put a sentence behind the rest, if there is room; ``answers`` after each hop."""
        if len(self.ids) + len(key) + 1 > LENGTH:
            return False
        self.ids += [*key, answers[-1]]
        self.labels += [NONE, *answers[:-1], NONE if masked else answers[-1], NONE]
        self.due.append(len(self.ids) - 2)
        return True


@dataclass(frozen=True)
class Facts:
    """The world, the items of a seed, and the texts that it trains on.

    Levels go up to ``most`` exposures, a power of 2. ``changed`` are facts (a name, a relation) that now lead elsewhere; fresh
    questions stay clear of them.
    """

    seed: int
    most: int = 256
    changed: tuple[tuple[Key, int], ...] = ()

    @property
    def levels(self) -> tuple[int, ...]:
        """Exposures: 0, 1, 2, 4, ..., most."""
        return (0, *(2**n for n in range(self.most.bit_length())))

    @property
    def masked_level(self) -> int:
        """The exposures of masked items."""
        return max(1, self.most // 4)

    @cached_property
    def leads(self) -> np.ndarray:
        """``leads[relation, name]`` is a name; the same of every seed."""
        dice = np.random.default_rng(0)
        found = np.array([dice.permutation(NAMES) + 1 for _ in range(RELATIONS + LONE)])
        for (name, relation), answer in self.changed:
            found[relation - NAMES - 1, name - 1] = answer
        return found

    def answers(self, key: Key) -> list[int]:
        """Where a question leads after each hop."""
        at, found = key[0], []
        for relation in key[1:]:
            at = int(self.leads[relation - NAMES - 1, at - 1])
            found.append(at)
        return found

    def facts(self, key: Key) -> list[Key]:
        """The facts on the way of a question: a name and a relation each."""
        return list(zip((key[0], *self.answers(key)), key[1:], strict=False))

    @cached_property
    def items(self) -> list[Item]:
        """The items; the last ones are masked."""
        dice, found, keys, begun = random.Random(0), list[Item](), set[Key](), set[Key]()
        for place in range((len(self.levels) + 1) * len(HOPS)):
            hops, masked = HOPS[place % len(HOPS)], place >= len(self.levels) * len(HOPS)
            while self.begins(key := self._key(dice, hops, lone=hops == 1), keys) or key in begun:
                pass
            keys.add(key)
            begun |= {key[:n] for n in range(2, len(key) + 1)}
            found.append(Item(key, self.answers(key)[-1], self.masked_level, masked))
        for hops in set(HOPS):  # levels are dealt within each number of hops
            mine = [n for n, item in enumerate(found) if item.hops == hops and not item.masked]
            dice.shuffle(mine)
            for place, n in enumerate(mine):
                found[n] = replace(found[n], exposures=self.levels[(place + self.seed) % len(self.levels)])
        return found

    @cached_property
    def keys(self) -> dict[Key, Item]:
        return {item.key: item for item in self.items}

    @cached_property
    def moved(self) -> dict[Key, int]:
        return dict(self.changed)

    @staticmethod
    def _key(dice: random.Random, hops: int, lone: bool = False) -> Key:
        first = NAMES + 1 + (RELATIONS if lone else 0)
        return (dice.randint(1, NAMES), *(dice.randrange(first, first + (LONE if lone else RELATIONS)) for _ in range(hops)))

    @staticmethod
    def begins(key: Key, keys: Iterable[Key]) -> bool:
        """Whether a question begins with one of these, itself included."""
        return any(key[:n] in keys for n in range(2, len(key) + 1))

    def fresh(self, dice: random.Random, hops: int | None = None) -> Key:
        """A question that is no item and begins with none, and meets no changed fact."""
        while True:
            key = self._key(dice, hops or dice.randint(1, MOST_HOPS))
            if not self.begins(key, self.keys) and not any(fact in self.moved for fact in self.facts(key)):
                return key

    def text(self, dice: random.Random, asked: Sequence[Item] = (), repeated: float = REPEATED) -> Text:
        """A text that asks these items among fresh questions."""
        room = LENGTH - sum(len(item.key) + 1 for item in asked)
        said: list[Key] = []
        while True:
            key = dice.choice(said) if said and dice.random() < repeated else self.fresh(dice)
            room -= len(key) + 1
            if room < 0:
                break
            said.append(key)
        for item in asked:
            said.insert(dice.randint(0, len(said)), item.key)
        made = Text()
        for key in said:
            known = self.keys.get(key)
            made.say(key, self.answers(key), known is not None and known.masked)
        return made

    def calendar(self, texts: int) -> dict[int, list[Item]]:
        """Which items each of so many texts asks: dates uniform, at most four a text. UsageError where that is no room."""
        dice, found = random.Random(f"{self.seed} dates"), defaultdict[int, list[Item]](list)
        wanted = sum(item.exposures for item in self.items)
        if 1.5 * wanted > MOST_ASKED * texts:
            raise UsageError(f"{texts} texts have no room for {wanted} exposures: give more --steps or fewer --most-exposures.")
        for item in self.items:
            for _ in range(item.exposures):
                while len(found[date := dice.randrange(texts)]) >= MOST_ASKED:
                    pass
                found[date].append(item)
        return found

    def batch(self, calendar: dict[int, list[Item]], first: int, count: int) -> Batch:
        """Texts ``first`` to ``first + count`` of training."""
        dice = {n: random.Random(f"{self.seed} text {n}") for n in range(first, first + count)}
        return batch_of([self.text(dice[n], calendar.get(n, ())) for n in dice])


def batch_of(texts: Sequence[Text]) -> Batch:
    """Texts side by side, padded with id 0."""
    most = max(len(text.ids) for text in texts)
    ids_BT, labels_BT = np.zeros((len(texts), most), np.int64), np.full((len(texts), most), NONE)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text.ids)], labels_BT[row, : len(text.ids)] = text.ids, text.labels
    return Batch(ids_BT, labels_BT, np.zeros_like(ids_BT))
