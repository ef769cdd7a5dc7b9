"""Pointer chasing: the answer is what following the pairs gives."""

from __future__ import annotations

import pytest

from adi.errors import UsageError
from adi.tasks.pointers import NONE, Pointers
from adi.tasks.registry import easier, most_hops, task_named

GAME = Pointers()


def test_answers_follow_the_pairs() -> None:
    drawn = GAME.batch(50, 1, hops=range(1, 13))
    columns = drawn.ids_BT.tolist(), drawn.labels_BT.tolist(), drawn.difficulty_BT[:, 0].tolist()
    for ids, labels, hops in zip(*columns, strict=True):
        links, steps, starts = dict(zip(ids[:32:2], ids[1:32:2], strict=True)), ids[32], ids[33:]
        assert len(links) == len(starts) == 16
        assert steps - 63 == hops
        for _ in range(hops):
            starts = [links[start] for start in starts]
        assert labels == [NONE] * 33 + starts
        assert GAME.check(ids) == tuple(ids)


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ([1, 2], "has 49 ids"),
        ([1] * 32 + [64] + [99] * 16, "99 is no symbol"),
        ([1] * 49, "1 says no number of hops; 64 to 75"),
    ],
)
def test_what_is_no_item_is_refused(ids: list[int], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        GAME.check(ids)
    with pytest.raises(UsageError, match="13"):
        GAME.batch(1, 0, hops=[13])


def test_both_ends_of_a_pair_share_its_number_and_nothing_else_does() -> None:
    pair, part = task_named("pointers").place_features or [[], []]
    assert len(pair) == len(part) == GAME.length
    assert [pair.count(n) for n in range(33)] == [2] * 16 + [1] * 17
    assert [(pair[n], part[n]) for n in (6, 7, 32, 33)] == [(3, 0), (3, 1), (16, 2), (17, 3)]


def test_an_easier_task_has_fewer_hops_and_only_tasks_with_hops_are_made_easier() -> None:
    for name, most in (("pointers", 8), ("p-hop", 16)):
        task = task_named(name)
        hardest = [int(easier(task, hops).batch(300, (1,)).difficulty_BT.max()) for hops in (1, 3, most)]
        assert hardest == [1, 3, most] == [1, 3, most_hops(task)]
    with pytest.raises(UsageError, match="mazes has none"):
        easier(task_named("mazes"), 2)
