"""Pointer chasing: the answer is what following the pairs gives."""

from __future__ import annotations

import pytest

from adi.errors import UsageError
from adi.tasks.pointers import NONE, Pointers

GAME = Pointers()


def test_answers_follow_the_pairs() -> None:
    drawn = GAME.batch(50, 1, hops=range(1, 13))
    columns = drawn.ids_BT.tolist(), drawn.labels_BT.tolist(), drawn.difficulty_BT[:, 0].tolist()
    for ids, labels, hops in zip(*columns, strict=True):
        links, (start, steps) = dict(zip(ids[:32:2], ids[1:32:2], strict=True)), ids[32:]
        assert len(links) == 16
        assert steps - 63 == hops
        for _ in range(hops):
            start = links[start]
        assert labels == [NONE] * 33 + [start]
        assert GAME.check(ids) == tuple(ids)


@pytest.mark.parametrize(
    ("ids", "match"),
    [([1, 2], "has 34 ids"), ([99] * 33 + [64], "99 is no symbol"), ([1] * 34, "1 says no number of hops; 64 to 75")],
)
def test_what_is_no_item_is_refused(ids: list[int], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        GAME.check(ids)
    with pytest.raises(UsageError, match="13"):
        GAME.batch(1, 0, hops=[13])
