"""Static mode from depth 0: the drafter, so many steps in every round; what the controller has to beat."""

from __future__ import annotations

import pytest

import adi
from adi.measure.bench.systems import DRAFT_LENGTHS, sweep
from conftest import exits_with_drafter


def test_static_mode_and_the_sweep_know_the_drafter_as_depth_0(llama: adi.Model) -> None:
    exits = exits_with_drafter(llama)
    assert adi.Static.depths_of(exits) == (0, *exits.depths)
    assert adi.Static.depths_of(adi.bare_exits(llama, (2, 4))) == (2, 4)
    found = sweep(llama, exits, [(1, 2, 3)], 6)
    assert {(t.depth, t.draft_tokens) for t in found.grid} == {(d, k) for d in (0, *exits.depths) for k in DRAFT_LENGTHS}
    policy = adi.Static(exits, 0, 3)
    assert policy.depths == (0,)
    got, full = (adi.generate(llama, [1, 2, 3], policy=p, max_new_tokens=14) for p in (policy, adi.FullDepth()))
    assert got.token_ids == full.token_ids
    told = got.summary()
    assert told.drafted >= 3 * (told.rounds - 1) - (1 + 2 + 3), "three in every round but the first, less where the end is near"
    assert {step.level for step in got.steps} <= {"drafter", "full"}
    batch = adi.generate_batch(llama, [[1, 2, 3], [5, 6]], policy=policy, max_new_tokens=14)
    assert batch[0].token_ids == full.token_ids


def test_depth_0_needs_a_drafter(llama: adi.Model) -> None:
    with pytest.raises(ValueError, match=r"no exit at depth 0 to draft from; choose among \[2, 4\]"):
        adi.Static(adi.bare_exits(llama, (2, 4)), 0, 3)
