"""Stories with a hidden world: who went where, who carries what, what lies in what; and questions where something is.

An answer follows a chain of facts, "the key is in the box, mary has the box, mary is in the kitchen": its length, 1 to 4 hops,
is the difficulty. A story is a text for a language model, which learns every next word; the test asks for the words after "?"
only. Training and test differ by seed: a story makes some 50 draws, far too many for one to come twice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from adi.errors import UsageError
from adi.tasks.pointers import NONE
from adi.tasks.products import Batch

PEOPLE = ("mary", "john", "sandra", "daniel")
CONTAINERS = ("box", "bag", "basket", "chest")
THINGS = ("ball", "apple", "book", "key", *CONTAINERS)
ROOMS = ("kitchen", "garden", "office", "bedroom", "hallway", "bathroom")
WORDS = ("<pad>", ".", "?", "the", "where", "is", "in", "went", "to", "took", "put", "dropped", "has", *PEOPLE, *THINGS, *ROOMS)
IDS = {word: number for number, word in enumerate(WORDS)}
QUESTION = IDS["?"]
MOST_HOPS = 4
HELD = 0.8  # share of things that are first met with a person or in a container
KINDS = {"go": 3, "lie": 3, "take": 1, "put": 4, "drop": 1}  # how often each kind of sentence is tried


@dataclass
class World:
    """Where everything is: ``at`` has for a person or a thing what it is in or with, and how many hops that takes."""

    dice: random.Random
    at: dict[str, tuple[str, int]] = field(default_factory=dict)

    def room(self, what: str) -> tuple[str, int]:
        """The room of a person or thing, and the hops to it."""
        place, hops = self.at[what]
        while place in self.at:
            place, further = self.at[place]
            hops += further
        return place, hops

    def sentence(self) -> str:
        """Something that happens, or is, and can."""
        while True:
            (kind,) = self.dice.choices(list(KINDS), list(KINDS.values()))
            before = dict(self.at)
            said: str | None = getattr(self, f"_{kind}")()
            if said is not None and max(self.room(what)[1] for what in self.at) <= MOST_HOPS:
                return said
            self.at = before

    def question(self) -> tuple[str, str, int]:
        """A question, its answer and its hops; all numbers of hops that there are alike."""
        known = {what: self.room(what) for what in self.at}
        hops = self.dice.choice(sorted({found[1] for found in known.values()}))
        what = self.dice.choice([what for what, found in known.items() if found[1] == hops])
        return f"where is {what if what in PEOPLE else 'the ' + what} ?", known[what][0], hops

    def _go(self) -> str:
        who = self.dice.choice(PEOPLE)
        room = self.dice.choice([r for r in ROOMS if self.at.get(who, ("", 0))[0] != r])
        self.at[who] = (room, 1)
        return f"{who} went to the {room} ."

    def _lie(self) -> str | None:
        what = self._one(what for what in THINGS if what not in self.at)
        if what is None:
            return None
        among = [place for place in (*PEOPLE, *CONTAINERS) if place in self.at]
        place = self.dice.choice(among if among and self.dice.random() < HELD else ROOMS)
        self.at[what] = (place, 1)
        return f"{place} has the {what} ." if place in PEOPLE else f"the {what} is in the {place} ."

    def _take(self) -> str | None:
        who = self._one(who for who in PEOPLE if who in self.at)
        what = who and self._one(w for w in self._here(who) if self.at[w][0] != who)
        if not who or not what:
            return None
        self.at[what] = (who, 1)
        return f"{who} took the {what} ."

    def _put(self) -> str | None:
        what = self._held()
        into = what and self._one(c for c in self._here(what) if c in CONTAINERS and not self._inside(c, what))
        if not what or not into:
            return None
        who, self.at[what] = self.at[what][0], (into, 1)
        return f"{who} put the {what} in the {into} ."

    def _drop(self) -> str | None:
        what = self._held()
        if what is None:
            return None
        who, self.at[what] = self.at[what][0], self.room(what)
        return f"{who} dropped the {what} ."

    def _held(self) -> str | None:
        return self._one(what for what in THINGS if self.at.get(what, ("", 0))[0] in PEOPLE)

    def _here(self, beside: str) -> list[str]:
        """Things in the room of a person or thing."""
        return [what for what in THINGS if what in self.at and self.room(what)[0] == self.room(beside)[0]]

    def _inside(self, what: str, other: str) -> bool:
        """Whether something is the other, or in it."""
        while what in self.at and what != other:
            what = self.at[what][0]
        return what == other

    def _one(self, among: Any) -> str | None:
        found = list(among)
        return self.dice.choice(found) if found else None


@dataclass(frozen=True)
class Stories:
    """Stories of as many sentences before each question as ``blocks`` says. A label stands where its word is the next."""

    blocks: tuple[int, ...] = (8, 3, 3, 3)
    length: int = 144
    name: str = "stories"
    unit: Literal["place"] = "place"
    causal: bool = True
    place_features: None = None
    vocabulary: int = len(WORDS)
    bins: tuple[tuple[int, int], ...] = tuple((n, n) for n in range(1, MOST_HOPS + 1))

    def story(self, dice: random.Random) -> tuple[list[str], list[int]]:
        """The words of a story, at most ``length``, and the hops of each of its questions."""
        world, words, hops = World(dice), list[str](), list[int]()
        for sentences in self.blocks:
            said = [world.sentence() for _ in range(sentences)]
            question, answer, steps = world.question()
            words += " ".join([*said, question, answer, "."]).split()
            hops.append(steps)
        return (words, hops) if len(words) <= self.length else self.story(dice)

    def batch(self, count: int, seed: Sequence[int], *, test: bool = False) -> Batch:
        """``count`` stories, padded with id 0; with ``test`` only the words after "?" have labels."""
        dice = random.Random(int(np.random.default_rng((int(test), *seed)).integers(2**63)))
        ids_BT, difficulty_BT = (np.zeros((count, self.length), np.int64) for _ in range(2))
        for row, (words, hops) in enumerate(self.story(dice) for _ in range(count)):
            ids_BT[row, : len(words)] = [IDS[word] for word in words]
            difficulty_BT[row, ids_BT[row] == QUESTION] = hops
        labels_BT = np.concatenate([ids_BT[:, 1:], np.zeros((count, 1), np.int64)], 1)
        wanted = self.asked(ids_BT) if test else labels_BT != IDS["<pad>"]
        return Batch(ids_BT, np.where(wanted, labels_BT, NONE), difficulty_BT)

    def asked(self, ids_BT: np.ndarray) -> np.ndarray:
        """The places of "?", where the answer is the next word."""
        return np.asarray(ids_BT == QUESTION)

    def parse(self, item: Any) -> tuple[int, ...]:
        """The ids of a text that ends with a question; UsageError for a word that stories do not have."""
        if not isinstance(item, str):
            raise UsageError(f"an item of {self.name} is a text, not {type(item).__name__}.")
        words = item.lower().replace(".", " . ").replace("?", " ? ").split()
        if bad := next((word for word in words if word not in WORDS[1:]), None):
            raise UsageError(f"{bad!r} is no word of {self.name}; they have {' '.join(WORDS[1:])}.")
        if words[-1:] != ["?"]:
            raise UsageError(f"a story ends with a question, not with {' '.join(words[-3:])!r}: add 'where is mary ?', say.")
        return tuple(IDS[word] for word in words)

    def show(self, number: int) -> str:
        """The word of an id."""
        return WORDS[number]
