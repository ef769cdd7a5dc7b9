"""Products with resets: the groups are groups, answers and distances are what one works out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from adi.errors import UsageError
from adi.tasks.products import GROUPS


@pytest.mark.parametrize("name", GROUPS)
def test_the_tables_are_groups(name: str) -> None:
    group, n = GROUPS[name], range(GROUPS[name].size)
    product = group.product
    assert all(product[0, a] == product[a, 0] == a for a in n)
    assert all(product[product[a, b], c] == product[a, product[b, c]] for a, b, c in itertools.product(n, n, n))
    assert all(sorted(row) == list(n) for row in product.tolist())
    assert (name == "Z7") == bool((product == product.T).all())


def test_s3_is_the_permutations_in_lexicographic_order() -> None:
    elements = list(itertools.permutations(range(3)))
    for a, b in itertools.product(range(6), range(6)):
        assert elements[GROUPS["S3"].product[a, b]] == tuple(elements[a][k] for k in elements[b])


def test_answers_are_products_since_the_last_reset() -> None:
    group = GROUPS["S3"]
    drawn = group.batch(8, 20, 3)
    for ids, labels, distances in zip(
        drawn.ids_BT.tolist(), drawn.labels_BT.tolist(), drawn.difficulty_BT.tolist(), strict=True
    ):
        now, since = 0, 0
        for token, label, distance in zip(ids, labels, distances, strict=True):
            now, since = (0, 0) if token == group.reset else (int(group.product[now, token]), since + 1)
            assert (label, distance) == (now, since)


def test_a_seed_gives_the_same_texts_and_others_give_others() -> None:
    a, b, c = (GROUPS["S3"].batch(4, 32, (0, n)).ids_BT for n in (1, 1, 2))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_ids_of_no_element_are_refused() -> None:
    assert GROUPS["S3"].check([0, 6, 5]) == (0, 6, 5)
    with pytest.raises(UsageError, match=r"7 is no id of S3; elements are 0 to 5, RESET is 6"):
        GROUPS["S3"].check([0, 7])
    with pytest.raises(UsageError, match="no ids"):
        GROUPS["S3"].check([])
