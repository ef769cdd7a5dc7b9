"""Wrong rules of acceptance, biased stop rules and a rollback that is off by one give another law, and the draws show it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from adi.decoding.requests import DraftToken
from laws import DRAFTERS, DRAWS, KINDS, SETTINGS, Drawn, Remembering, V, density, exact, off, sampled


class Gullible(Remembering):
    """Every draft stands."""

    def __call__(self, text: Sequence[int], reading: Any, draft: DraftToken | None = None) -> int:
        return super().__call__(text, reading, draft) if draft is None else draft.token


class WrongDensity(Remembering):
    """A likeliest token is judged as if it had been drawn from the exit's density."""

    def __call__(self, text: Sequence[int], reading: Any, draft: DraftToken | None = None) -> int:
        if draft is not None:
            draft = dataclasses.replace(draft, density_V=density(tuple(text)))
        return super().__call__(text, reading, draft)


class NoResidual(Remembering):
    """A refused draft is replaced by a draw from all of ``p`` instead of ``p`` without it."""

    def __call__(self, text: Sequence[int], reading: Any, draft: DraftToken | None = None) -> int:
        token = super().__call__(text, reading, draft)
        return token if draft is None or token == draft.token else super().__call__(text, reading)


class Peeking(Remembering):
    """A stop rule that looks at the token about to be drawn: where it is a draft that it dislikes, the draft is thrown away,
    and the token drawn anew."""

    def __call__(self, text: Sequence[int], reading: Any, draft: DraftToken | None = None) -> int:
        token = super().__call__(text, reading, draft)
        return super().__call__(text, reading) if draft is not None and token == draft.token and token % 2 else token


@pytest.mark.parametrize("wrong", [Gullible, WrongDensity, NoResidual, Peeking])
@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_wrong_rule_is_caught(wrong: type[Remembering], kind: str) -> None:
    found, _, _ = sampled(KINDS[kind], wrong(SETTINGS["hot"]), DRAWS // 4)
    assert off(found, exact(SETTINGS["hot"])) > 1.2


def test_a_wrong_density_and_a_biased_stop_rule_of_drawn_drafts_are_caught() -> None:
    hot = SETTINGS["hot"]
    flat = Drawn(stated=lambda q: torch.full_like(q, 1 / V))
    particular = Drawn(dislikes=frozenset({0, 1, 2}))
    for make in (flat, particular):
        found, _, _ = sampled(make, Remembering(hot), DRAWS // 4)
        assert off(found, exact(hot)) > 1.2


@pytest.mark.parametrize("kind", DRAFTERS)
def test_an_off_by_one_in_rollback_is_caught(kind: str) -> None:
    found, _, _ = sampled(KINDS[kind], Remembering(SETTINGS["hot"]), DRAWS // 4, slip=1)
    assert off(found, exact(SETTINGS["hot"])) > 1.2
