"""The controller against scripted drafters: its promises about the worst case, and that it finds what pays."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adi.decoding.drafting.controller import HOPELESS, LOSS, Controller, DraftChoice, PassShare, bin_of
from adi.decoding.drafting.cost_model import CostModel
from adi.decoding.drafting.proposers import FixedLength
from adi.decoding.drafting.rounds import DraftRound, draft_together
from adi.drafters.ngram import NgramMatch
from scripted import ScriptedDrafter, UntaughtCosts

STEEP = {1: 20.0, 2: 20.2, 3: 23.8, 4: 25.4, 6: 33.7, 8: 42.6, 12: 48.5, 16: 57.5}  # measured, int8 on an AVX2 machine
FLAT = {1: 26.0, 4: 28.0, 8: 31.0, 16: 40.0}
TABLES = {
    "steep": UntaughtCosts(STEEP, 1.2),
    "flat": UntaughtCosts(FLAT, 1.5),
    "dear": UntaughtCosts({1: 10.0, 2: 13.0, 4: 19.0, 8: 31.0}, 1.5),
}


@dataclass
class Outcome:
    """Of one simulated text: when each token was final, and the tokens of each round by level."""

    seconds: list[float]
    rounds: list[tuple[str, int, int]]

    def worst_ratio(self, plain: float, window: int) -> float:
        """Of full depth's time over this one's, over any ``window`` tokens."""
        times = [0.0, *self.seconds]
        return min(plain * window / (times[i + window] - times[i]) for i in range(len(times) - window))


Right = Callable[[int], float]  # position to the chance that a draft there is right


def simulate(
    costs: CostModel,
    right: Right,
    tokens: int,
    *,
    confidence: Callable[[int, bool], float],
    memory: bool = False,
    beside: Sequence[NgramMatch] = (),
    seed: int = 0,
    sequences: int = 1,
) -> Outcome:
    """Decode with a drafter (or a memory with long matches; or a drafter with those ``beside`` it) that is right as ``right``
    says; of several sequences, which share every pass, the outcome of all together."""
    rng = random.Random(seed)
    controllers = [Controller(costs.copy()) for _ in range(sequences)]
    places, now, rounds, times = [0] * sequences, 0.0, [], []
    truths: list[list[bool]] = [[]] * sequences
    drafter = ScriptedDrafter(lambda i, draft: (1, confidence(places[i] + draft, truths[i][draft])))
    matches = [NgramMatch((1,) * 15, 8, "context")] if memory else list(beside)
    while min(places) * sequences < tokens:
        truths = [[rng.random() < right(place + i) for i in range(16)] for place in places]
        asked = [
            DraftRound(c, matches, not memory, 15, 1, p, lambda _: False) for c, p in zip(controllers, places, strict=True)
        ]
        for i, one in enumerate(asked):
            one.drafting, one.state = drafter, drafter.start(i)
        drafter.calls.clear()
        draft_together(asked)
        now += costs.rows(sequences + sum(len(one.tokens) for one in asked))
        for step, together in enumerate(drafter.calls):
            now += costs.drafting(step + 1, together) - costs.drafting(step, together)
        for i, one in enumerate(asked):
            drafts = len(one.tokens)
            accepted = next((j for j in range(drafts) if not truths[i][j]), drafts)
            controllers[i].update(one.choice, one.confidences, drafts, accepted, one.seconds)
            places[i] += accepted + 1
            times += [now] * (accepted + 1)
            rounds.append((one.choice.level, drafts, accepted))
    return Outcome(times[:tokens], rounds)


def honest(rng: random.Random) -> Callable[[int, bool], float]:
    return lambda _, right: rng.uniform(0.4, 1.0) if right else rng.uniform(0.1, 0.7)


def boastful(_: int, right: bool) -> float:
    return 0.95


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("table", TABLES)
def test_a_drafter_that_is_always_wrong_costs_next_to_nothing(table: str, memory: bool) -> None:
    costs = TABLES[table]
    got = simulate(costs, lambda _: 0.0, 1000, confidence=boastful, memory=memory)
    assert got.worst_ratio(costs.rows(1), 200) >= 0.97


@pytest.mark.parametrize("table", TABLES)
def test_many_that_are_always_wrong_cost_no_more_than_one(table: str) -> None:
    beside = (
        NgramMatch((1,) * 15, 8, "context"),
        NgramMatch((2,) * 15, 6, "history"),
        NgramMatch((3,) * 8, 5, "datastore", (0.9,) * 8),
    )
    got = simulate(TABLES[table], lambda _: 0.0, 1000, confidence=boastful, beside=beside)
    assert got.worst_ratio(TABLES[table].rows(1), 200) >= 0.97
    assert "memory" in {level for level, _, _ in got.rounds}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("period", [40, 100, 300])
def test_bursts_do_not_ruin_it(table: str, period: int) -> None:
    costs = TABLES[table]
    for seed in range(5):
        got = simulate(
            costs, lambda i: 0.95 if (i // period) % 2 else 0.0, 1500, confidence=honest(random.Random(seed)), seed=seed
        )
        assert got.worst_ratio(costs.rows(1), 200) >= 0.97
        assert got.seconds[-1] < 1500 * costs.rows(1)


@pytest.mark.parametrize("table", TABLES)
def test_a_drafter_that_is_always_right_is_used_in_full(table: str) -> None:
    costs = TABLES[table]
    got = simulate(costs, lambda _: 1.0, 400, confidence=boastful)
    best = max((k + 1) / (costs.rows(k + 1) + k * costs.draft_seconds) for k in range(7))
    assert 400 / got.seconds[-1] > 0.9 * best


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("table", TABLES)
def test_it_recovers_within_50_tokens(table: str, memory: bool) -> None:
    costs = TABLES[table]
    got = simulate(costs, lambda i: float(i >= 600), 800, confidence=boastful, memory=memory)
    best = max((k + 1) / (costs.rows(k + 1) + (0 if memory else k) * costs.draft_seconds) for k in range(16 if memory else 7))
    later = got.seconds[749] - got.seconds[649]
    assert 100 / later > 0.85 * best


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.65, 0.8])
def test_it_is_near_the_best_fixed_length(table: str, share: float) -> None:
    """Of chains with independent drafts, whose best length is known."""
    costs = TABLES[table]
    rates = [sum(share**i for i in range(k + 1)) / (costs.rows(k + 1) + k * costs.draft_seconds) for k in range(7)]
    got = simulate(costs, lambda _: share, 4000, confidence=lambda *_: share)
    assert 4000 / got.seconds[-1] > 0.92 * max(rates)


def test_costs_between_and_beyond_what_was_measured() -> None:
    costs = CostModel({1: 10.0, 4: 16.0, 8: 24.0}, 1.0)
    assert [costs.rows(n) for n in (1, 2, 3, 4, 6, 8, 10)] == [10, 12, 14, 16, 20, 24, 28]
    costs.passed(2, 12.0)
    assert costs.rows(2) == 12
    for _ in range(200):
        costs.passed(2, 20.0)
    assert 19 < costs.rows(2) <= 20
    before = costs.rows(1)
    costs.passed(1, 1e9)
    assert costs.rows(1) <= before * 1.1, "however long it took"


def test_bins_are_tenths() -> None:
    assert [bin_of(p) for p in (-1, 0, 0.05, 0.1, 0.55, 0.999, 1.0)] == [0, 0, 0, 1, 5, 9, 9]


def planned_plainly(controller: Controller, offer: DraftChoice) -> tuple[int, float]:
    """The obvious way to plan: every number of drafts, none left out."""
    costs = controller.costs
    assert costs is not None
    one = costs.rows(1)
    best, most, tokens, reach = 0, 0.0, 1.0, 1.0
    for drafts, share in enumerate(list(controller._acceptances(offer)), 1):
        seconds = costs.rows(drafts + 1) + (costs.drafting(drafts) if offer.match is None else 0.0)
        reach *= share
        if seconds > (1 + LOSS) * one - controller._lost or (reach < HOPELESS and drafts > 1):
            break
        tokens += reach
        if tokens / seconds > most:
            best, most = drafts, tokens / seconds
    return best, most


@given(
    st.lists(st.floats(0.0, 3.0), min_size=16, max_size=16),
    st.floats(0.0, 2.0),
    st.sampled_from(["context", "history"]),
    st.integers(1, 8),
    st.lists(st.floats(0.0, 1.0), max_size=8),
    st.integers(0, 15),
    st.lists(st.booleans(), max_size=30),
)
def test_planning_gives_up_only_what_could_not_pay(steps, draft, source, matched, shares, most, past) -> None:
    costs = CostModel({rows: 5.0 + sum(steps[:rows]) for rows in range(1, 17)}, draft)
    controller = Controller(costs)
    controller.choose([], False, 0, PassShare.alone(costs))
    matches = [NgramMatch((1,) * 15, matched, source), NgramMatch((1,) * len(shares), matched, "datastore", tuple(shares))]
    offers = [DraftChoice("memory", min(len(match.tokens), most), match) for match in matches if match.tokens]
    offers.append(DraftChoice("drafter", min(6, most)))
    for right in past:
        for offer in offers:
            if offer.drafts:
                controller.update(
                    DraftChoice(offer.level, 1, offer.match), [0.5], 1, int(right), controller._price(offer.source, 1)
                )
    for offer in offers:
        assert controller._plan(offer) == pytest.approx(planned_plainly(controller, offer))


BATCH_TABLES = {
    "one bucket": UntaughtCosts(
        {1: 43, 3: 47, 4: 50, 8: 62, 12: 105, 16: 130, 24: 175, 32: 215, 64: 420}, 4.0, 2.0
    ),  # int4, AVX-512
    "flat": UntaughtCosts(FLAT, 1.5, 0.7),
    "steep": UntaughtCosts(STEEP, 1.2, 0.6),
    "by the row": UntaughtCosts({1: 4.0, 64: 67.0}, 0.4),
    "free": UntaughtCosts({1: 1.0, 64: 1.3}, 0.02),
}


@pytest.mark.parametrize("sequences", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("table", BATCH_TABLES)
def test_no_load_makes_drafting_slower_than_full_depth(table: str, sequences: int) -> None:
    """By the second of the whole batch, for drafters of every quality."""
    costs, rounds = BATCH_TABLES[table], 200
    for share in (0.0, 0.3, 0.6, 0.9):
        dice = random.Random(sequences)
        got = simulate(costs, lambda _, p=share: p, rounds * sequences, confidence=honest(dice), sequences=sequences)  # type: ignore[misc]
        assert costs.rows(sequences) * rounds / got.seconds[-1] >= (0.97 if sequences == 1 else 0.98)


@pytest.mark.parametrize("sequences", [1, 2, 4])
@pytest.mark.parametrize("table", ["one bucket", "flat", "free"])
def test_few_sequences_gain_about_what_the_best_fixed_length_would(table: str, sequences: int) -> None:
    costs, rounds = BATCH_TABLES[table], 200
    for share in (0.5, 0.7, 0.9):
        dice = random.Random(sequences)
        got = simulate(costs, lambda _, p=share: p, rounds * sequences, confidence=honest(dice), sequences=sequences)  # type: ignore[misc]
        tokens = [sum(share**i for i in range(k + 1)) for k in range(7)]
        best = max(many / (costs.rows((k + 1) * sequences) + costs.drafting(k, sequences)) for k, many in enumerate(tokens))
        assert rounds / got.seconds[-1] > 0.92 * best


def test_drafting_thins_out_as_load_grows() -> None:
    dice, drafts = random.Random(0), []
    for sequences in (1, 2, 4, 8, 16, 32):
        got = simulate(BATCH_TABLES["one bucket"], lambda _: 0.7, 100 * sequences, confidence=honest(dice), sequences=sequences)
        drafts.append(sum(made for _, made, _ in got.rounds) / len(got.rounds))
    assert drafts == sorted(drafts, reverse=True)
    assert drafts[0] > 2
    assert drafts[-1] < 0.1


def test_a_pass_holds_no_more_rows_than_share_their_bits() -> None:
    costs = BATCH_TABLES["free"]
    asked = [
        DraftRound(Controller(costs), [NgramMatch((1,) * 15, 8, "context")], False, 15, 1, 9, lambda _: False) for _ in range(9)
    ]
    draft_together(asked, beside=5, most_rows=30)
    assert sum(1 + len(one.tokens) for one in asked) + 5 == 30


@pytest.mark.parametrize("beside", [0, 20, 70])
def test_looks_at_what_has_not_paid_fill_no_pass_beyond_that_either(beside: int) -> None:
    costs = UntaughtCosts({1: 36.4, 64: 61.6}, 0.0)  # a row costs 0.4 of a token, and one draft in four is right
    asked = [
        DraftRound(Controller(costs), [NgramMatch((1,), 1, "context")], False, 15, 1, 9, lambda _: False) for _ in range(60)
    ]
    for one in asked:
        one.control._saved["context"] = one.control._saved["memory"] = 1e9  # type: ignore[attr-defined]
    draft_together(asked, beside=beside)
    assert sum(len(one.tokens) for one in asked) == max(0, 64 - 60 - beside)


def test_drafts_that_nobody_prices_are_made_beside_full_passes() -> None:
    asked = [DraftRound(Controller(BATCH_TABLES["free"]), [], False, 15, 1, 9, lambda _: False) for _ in range(60)]
    fixed = DraftRound(FixedLength(), [NgramMatch((1,) * 15, 8, "context")], False, 15, 1, 9, lambda _: False)
    draft_together([*asked, fixed])
    assert len(fixed.tokens) == 15


def test_the_likeliest_drafts_of_all_sequences_come_first() -> None:
    """A row in a pass of eight costs most of a token's time: only drafts that are nearly sure are worth one."""
    costs = UntaughtCosts({1: 1.0, 64: 19.9}, 0.0)  # each further row three tenths of the first
    sure, unsure = NgramMatch((1,) * 15, 8, "context"), NgramMatch((1,) * 15, 1, "context")
    asked = [DraftRound(Controller(costs), [match], False, 15, 1, 9, lambda _: False) for match in (unsure, sure) * 4]
    draft_together(asked)
    drafts = [len(one.tokens) for one in asked]
    assert set(drafts[::2]) == {0}
    assert min(drafts[1::2]) > 0


def test_a_drafter_draws_for_all_sequences_in_one_call() -> None:
    drafter = ScriptedDrafter(lambda i, _: (1, 0.99 if i < 3 else 0.01))
    asked = [DraftRound(Controller(BATCH_TABLES["free"]), [], True, 15, 1, 9, lambda _: False) for _ in range(5)]
    for i, one in enumerate(asked):
        one.drafting, one.state = drafter, drafter.start(i)  # type: ignore[assignment]
    draft_together(asked)
    assert drafter.calls[0] == 5
    assert drafter.calls[-1] == 3, "who is not sure stops earlier"
