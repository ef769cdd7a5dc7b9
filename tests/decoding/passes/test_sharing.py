"""Who shares a pass, against what is foreseen of it."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from adi.decoding.frontier import BlockPass
from adi.decoding.passes.sharing import Pace, chosen_for, rows_beside
from adi.model.backbone import Rows, Spec


@given(
    st.lists(st.integers(2, 90), max_size=3),
    st.lists(st.integers(1, 4), max_size=6),
    st.integers(1, 40),
    st.sampled_from([1, 64]),
    st.sampled_from([None, Pace(), Pace(1.0, 0.05), Pace(1.0, 0.5)]),
)
def test_who_drafts_knows_how_many_rows_the_pass_will_have_beside(
    prompts: list[int], others: list[int], drafting: int, chunk: int, pace: Pace | None
) -> None:
    """As the pass is then put together of all of them, those that draft with a row each."""
    spec = Spec("", "", 4, 8, 100, (4,), None, "", "", "", "", merged_rows=64, chunk=chunk)
    waiting = [BlockPass(Rows(None, 0, (0,) * n, None, True), 0, 4) for n in prompts]
    waiting += [BlockPass(Rows(None, 9, (0,) * n, None), 0, 4) for n in others]
    drafters = [BlockPass(Rows(None, 9, (0,), None), 0, 4) for _ in range(drafting)]
    beside = rows_beside(spec, waiting, drafting, pace)
    chosen = [need for _, need in chosen_for(spec, [(None, need) for need in (*drafters, *waiting)], pace)]
    rows = sum(len(need.rows.ids) for need in chosen)
    if sum(others) + drafting > 64 or (chunk > 1 and sum(prompts) + sum(others) + drafting > 64):
        assert beside == 0
    elif pace is None and chunk == 1 and prompts:
        assert beside == min(64 - drafting, sum(others) + min(sum(prompts), 64 - drafting - sum(others)))
    elif prompts and pace is not None and drafting + sum(others) > 64 - min(pace.rows(min(64, drafting + sum(others))), 32):
        assert drafting + beside <= 64, "some of them will wait for the next pass: no room is left for drafts"
    else:
        assert abs(rows - drafting - beside) <= 1, "a lone row of a prompt is left to the next pass"


@given(
    st.lists(st.integers(2, 90), min_size=1, max_size=4),
    st.lists(st.integers(1, 4), min_size=1, max_size=70),
    st.sampled_from([8, 16, 64]),
    st.sampled_from([Pace(), Pace(1.0, 0.05), Pace(1.0, 0.5), Pace(1.0, 9.0)]),
)
@example([30, 3], [1] * 40, 64, Pace())
@example([3], [1] * 70, 64, Pace(1.0, 9.0))
def test_a_shared_pass_has_no_more_rows_than_may_share_one(
    prompts: list[int], others: list[int], most: int, pace: Pace
) -> None:
    """Above that number rows may have other bits. No prompt waits for others to end."""
    spec = Spec("", "", 4, 8, 100, (4,), None, "", "", "", "", merged_rows=most, chunk=1)
    waiting = [BlockPass(Rows(None, 9, (0,) * n, None), 0, 4) for n in others]
    waiting += [BlockPass(Rows(None, 0, (0,) * n, None, True), 0, 4) for n in prompts]
    chosen = [need for _, need in chosen_for(spec, [(None, need) for need in waiting], pace)]
    assert sum(len(need.rows.ids) for need in chosen) <= most
    assert any(need.rows.prompt for need in chosen)


def test_a_long_prompts_passes_are_short_where_others_may_come() -> None:
    """A newcomer waits for the pass that runs. Where nobody can come the whole part goes in one."""
    spec = Spec("", "", 4, 8, 100, (4,), None, "", "", "", "", merged_rows=64, chunk=1)
    need = BlockPass(Rows(None, 0, (0,) * 2048, None, True), 0, 4)
    for pace, rows in ((Pace(), 2048), (None, 2048), (Pace(alone=256), 256), (Pace(1.0, 0.05, 2.0, 256), 256)):
        ((_, part),) = chosen_for(spec, [(None, need)], pace)
        assert len(part.rows.ids) == rows
    ((_, part),) = chosen_for(spec, [(None, BlockPass(Rows(None, 0, (0,) * 257, None, True), 0, 4))], Pace(alone=256))
    assert len(part.rows.ids) == 255, "none is left over alone"
