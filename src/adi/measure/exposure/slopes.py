"""Partial slopes of depth on familiarity, with bootstrap intervals over items and a permutation test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, PERMUTATIONS = 1000, 200


@dataclass(frozen=True)
class Table:
    """N observations: ``exposure_N`` (what the slope is on), ``covariates_NK``, and which item each is of, ``item_N``."""

    exposure_N: np.ndarray
    covariates_NK: np.ndarray
    item_N: np.ndarray

    @classmethod
    def joined(cls, tables: Sequence[Table]) -> Table:
        """Several tables (seeds), each with a level of its own and items of its own."""
        own = [np.repeat(np.eye(len(tables))[n][None], len(t.item_N), 0) for n, t in enumerate(tables)]
        covariates_NK = np.concatenate([np.concatenate([t.covariates_NK, o], 1) for t, o in zip(tables, own, strict=True)])
        places = [np.unique(t.item_N, return_inverse=True)[1] for t in tables]
        firsts = np.cumsum([0, *(int(p.max()) + 1 for p in places[:-1])])
        item_N = np.concatenate([first + place for first, place in zip(firsts, places, strict=True)])
        return cls(np.concatenate([t.exposure_N for t in tables]), covariates_NK, item_N)

    def design(self, exposure_N: np.ndarray) -> np.ndarray:
        """Exposure first, then what is held equal, each of unit spread, and a constant."""
        spread_K = self.covariates_NK.std(0)
        kept = self.covariates_NK[:, spread_K > 1e-9]
        return np.column_stack([exposure_N, (kept - kept.mean(0)) / spread_K[spread_K > 1e-9], np.ones(len(exposure_N))])

    def dealt(self, dice: np.random.Generator) -> np.ndarray:
        """What the covariates do not say about exposure, dealt anew: among items, or within each where its exposures differ."""
        others_NK = self.design(self.exposure_N)[:, 1:]
        left_N = self.exposure_N - others_NK @ np.linalg.lstsq(others_NK, self.exposure_N, rcond=None)[0]
        _, first, place_N = np.unique(self.item_N, return_index=True, return_inverse=True)
        if np.ptp(self.exposure_N - self.exposure_N[first][place_N]) < 1e-9:
            left_I = np.bincount(place_N, left_N) / np.bincount(place_N)
            return np.array([dice.permutation(left_I)[place_N] for _ in range(PERMUTATIONS)])
        dealt_PN, order_N = np.empty((PERMUTATIONS, len(left_N))), np.argsort(place_N, kind="stable")
        for dealt_N in dealt_PN:
            dealt_N[order_N] = left_N[np.lexsort((dice.random(len(left_N)), place_N))]
        return dealt_PN


@dataclass(frozen=True)
class Slope:
    """A slope, that of each bootstrap sample of items, and those of permuted exposures."""

    value: float
    resampled_S: np.ndarray
    permuted_P: np.ndarray

    def minus(self, other: Slope) -> Slope:
        """The difference to another of the same items, resample by resample."""
        return Slope(self.value - other.value, self.resampled_S - other.resampled_S, self.permuted_P - other.permuted_P)

    def to_json(self) -> dict[str, object]:
        """The slope, its 95% interval, the middle 95% of permuted ones, and the share of those at least as far from 0."""
        low, high = np.quantile(self.resampled_S, (0.025, 0.975))
        least, most = np.quantile(self.permuted_P, (0.025, 0.975))
        beyond = int((np.abs(self.permuted_P) >= abs(self.value)).sum())
        return {
            "slope": self.value,
            "interval": [float(low), float(high)],
            "permuted": [float(least), float(most)],
            "p": (beyond + 1) / (len(self.permuted_P) + 1),
        }


def partial_slope(table: Table, depth_N: np.ndarray, seed: int = 0) -> Slope:
    """Least squares of depth on exposure and all covariates; items are resampled whole (Efron 1979)."""
    dice = np.random.default_rng(seed)
    place_N, count = np.unique(table.item_N, return_inverse=True)[1], len(np.unique(table.item_N))
    design_NK = table.design(table.exposure_N)

    def sums(design_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Normal equations of each item."""
        squares, products = np.zeros((count, *2 * design_NK.shape[1:])), np.zeros((count, design_NK.shape[1]))
        np.add.at(squares, place_N, design_NK[:, :, None] * design_NK[:, None])
        np.add.at(products, place_N, design_NK * depth_N[:, None])
        return squares, products

    def solved(squares: np.ndarray, products: np.ndarray) -> np.ndarray:
        ridge = 1e-9 * len(depth_N) * np.eye(squares.shape[-1])
        return np.asarray(np.linalg.solve(squares + ridge, products[..., None])[..., 0, 0])

    squares, products = sums(design_NK)
    times_SI = dice.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    resampled_S = solved(np.tensordot(times_SI, squares, 1), times_SI @ products)
    dealt_PN = table.dealt(dice)
    rest_N = depth_N - design_NK[:, 1:] @ np.linalg.lstsq(design_NK[:, 1:], depth_N, rcond=None)[0]
    permuted_P = dealt_PN @ rest_N / np.square(dealt_PN - dealt_PN.mean(1, keepdims=True)).sum(1)
    return Slope(float(solved(squares.sum(0), products.sum(0))), resampled_S, permuted_P)
