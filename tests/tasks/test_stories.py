"""Stories: answers are what a reader of the sentences works out, who knows nothing of the generator."""

from __future__ import annotations

import re

import numpy as np
import pytest

from adi.errors import UsageError
from adi.tasks.pointers import NONE
from adi.tasks.stories import IDS, PEOPLE, QUESTION, ROOMS, WORDS, Stories

GAME = Stories()


def read(words: list[str]) -> list[tuple[str, int]]:
    """The answer and the number of facts of each question, from the text alone: each sentence changes one fact."""
    facts: dict[str, tuple[str, int]] = {}
    found = []

    def follow(what: str) -> tuple[str, int]:
        place, hops = facts[what]
        if place in ROOMS:
            return place, hops
        room, further = follow(place)
        return room, hops + further

    for sentence in re.findall(r"[^.?]+[.?]", " ".join(words)):
        said = sentence.replace("the ", "").split()[:-1]
        match said:
            case [who, "went", "to", place]:
                facts[who] = (place, 1)
            case ["where", "is", what]:
                found.append(follow(what))
            case [what, "is", "in", place] | [_, "put", what, "in", place]:
                facts[what] = (place, 1)
            case [who, "has", what]:
                facts[what] = (who, 1)
            case [who, "took", what]:
                assert follow(who)[0] == follow(what)[0]
                facts[what] = (who, 1)
            case [who, "dropped", what]:
                assert facts[what][0] == who
                facts[what] = follow(what)
            case [answer]:
                assert answer == found[-1][0]
    return found


def test_answers_and_hops_are_those_of_a_reader() -> None:
    drawn = GAME.batch(40, (2,), test=True)
    seen = set()
    for ids, labels, hops in zip(drawn.ids_BT.tolist(), drawn.labels_BT.tolist(), drawn.difficulty_BT.tolist(), strict=True):
        found = read([WORDS[i] for i in ids if i])
        at = [place for place, i in enumerate(ids) if i == QUESTION]
        assert [(WORDS[labels[place]], hops[place]) for place in at] == found
        assert all((label == NONE) == (place not in at) for place, label in enumerate(labels))
        seen |= {h for _, h in found}
    assert seen == {1, 2, 3, 4}


def test_every_next_word_is_learned_and_no_padding() -> None:
    drawn = GAME.batch(5, (0,))
    after = np.roll(drawn.ids_BT, -1, 1)
    known = drawn.labels_BT != NONE
    assert (drawn.labels_BT == after)[known].all()
    assert (known.sum(1) == (drawn.ids_BT != 0).sum(1) - 1).all()


def test_a_seed_gives_the_same_stories_and_the_test_has_its_own() -> None:
    a, b, c = (GAME.batch(100, (7,), test=test).ids_BT for test in (False, False, True))
    assert np.array_equal(a, b)
    assert len({tuple(row) for row in (*a.tolist(), *c.tolist())}) == 200


def test_a_text_becomes_ids() -> None:
    assert GAME.parse("Mary went to the kitchen. Where is mary?")[-2:] == (IDS["mary"], QUESTION)
    assert set(PEOPLE) < set(WORDS)


@pytest.mark.parametrize(
    ("item", "match"),
    [
        ([1], "is a text, not list"),
        ("the dog .", "'dog' is no word of stories"),
        ("mary went to the kitchen .", "ends with a question"),
        ("", "ends with a question"),
    ],
)
def test_what_is_no_story_is_refused(item: object, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        GAME.parse(item)
