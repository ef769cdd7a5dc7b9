"""p-hop induction: the answer is what going back and on, p times, gives by its definition."""

from __future__ import annotations

import pytest

from adi.errors import UsageError
from adi.tasks.hops import Hops

GAME = Hops()


def slow(text: list[int], place: int, hops: int) -> tuple[int, int]:
    """The answer and the number of hops that were followed, one letter at a time."""
    for hop in range(1, hops + 1):
        back = place - 1
        while back >= 0 and text[back] != text[place]:
            back -= 1
        if back < 0:
            return GAME.letters, hop
        place = back + 1
    return text[place], hops


def test_answers_are_those_of_the_definition() -> None:
    drawn = GAME.batch(30, (1,))
    for ids, labels, followed in zip(
        drawn.ids_BT.tolist(), drawn.labels_BT.tolist(), drawn.difficulty_BT.tolist(), strict=True
    ):
        p, text = ids[0] - GAME.letters, ids[1:]
        assert 1 <= p <= 16
        assert [slow(text, i, p) for i in range(64)] == list(zip(labels[1:], followed[1:], strict=True))
        assert (labels[0], followed[0]) == (GAME.letters, 0)
        assert GAME.parse(ids) == tuple(ids)


def test_training_and_test_share_no_text() -> None:
    texts = [tuple(row) for test in (False, True) for row in GAME.batch(300, (0,), test=test).ids_BT.tolist()]
    assert len(set(texts)) == 600


@pytest.mark.parametrize(
    ("item", "match"),
    [
        ("abc", "is a list of ids, not str"),
        ([5], "holds 1 ids"),
        ([3, 1], "3 says no number of hops; 5 to 20"),
        ([5, 4], "4 is no letter"),
    ],
)
def test_what_is_no_item_is_refused(item: object, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        GAME.parse(item)
