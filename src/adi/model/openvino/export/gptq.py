"""Four-bit weights that err where it matters least: GPTQ (Frantar et al. 2023) over groups with integer zero points.

Rounding to a 4-bit grid loses much on a small model, the more so where the weights come from another 4-bit grid. So columns
are rounded one after the other, and what one gets wrong the next ones make up for, weighed by how inputs move together
(``H = sum of x x^T`` over some text). Scales and zero points are searched beforehand, weighed by H's diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32  # inputs that share a scale and a zero point: the block length of GGUF's 4-bit formats, too
LEVELS = 15
DAMPING = 0.01
COLUMNS = 96  # columns rounded before the rest of the matrix is corrected
STRETCHES = (0.85, 0.9, 0.95, 0.975, 1.0, 1.025, 1.05, 1.1, 1.15)
REACH = 2  # zero points further than this from the nearest one are not tried
PIECE = 1 << 18  # weights for which grids are searched at a time: they stay in the processor's cache


@dataclass(frozen=True)
class FourBits:
    """A matrix as ``(codes - zero) * scale``: codes ``[N, K]`` 0 to 15, zeros and scales ``[N, G]``; ``error`` is the energy of
    its wrong output over the text, ``tr(E H E^T)``."""

    codes_NK: Tensor
    zero_NG: Tensor
    scale_NG: Tensor
    error: float


def gptq(weight_NK: Tensor, hessian_KK: Tensor | None) -> FourBits:
    """The matrix in four bits, K a multiple of 32; without a Hessian only rounded, as if it were the identity."""
    if hessian_KK is None:
        scale_NG, zero_NG = _grids(weight_NK, torch.ones(weight_NK.shape[1]), (1.0,))
        scale_NK, zero_NK = (grid.repeat_interleave(GROUP, 1) for grid in (scale_NG, zero_NG))
        codes_NK = (weight_NK / scale_NK + zero_NK).round_().clamp_(0, LEVELS)
        error = ((codes_NK - zero_NK) * scale_NK - weight_NK).square_().sum(dtype=torch.float64)
        return FourBits(codes_NK, zero_NG, scale_NG, float(error))
    h = hessian_KK.double()
    ridge = DAMPING * h.diagonal().mean().clamp_min(1e-12)
    h = h + ridge * torch.eye(len(h), dtype=torch.float64)
    upper_KK = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    scale_NG, zero_NG = _grids(weight_NK, h.diagonal().float())
    left_NK, codes_NK = weight_NK.clone(), torch.empty_like(weight_NK)
    for begin in range(0, weight_NK.shape[1], COLUMNS):
        end = min(weight_NK.shape[1], begin + COLUMNS)
        wrong = torch.zeros(len(weight_NK), end - begin)
        for k in range(begin, end):
            scale, zero = scale_NG[:, k // GROUP], zero_NG[:, k // GROUP]
            codes_NK[:, k] = (left_NK[:, k] / scale + zero).round().clamp(0, LEVELS)
            wrong[:, k - begin] = (left_NK[:, k] - (codes_NK[:, k] - zero) * scale) / upper_KK[k, k]
            left_NK[:, k + 1 : end] -= wrong[:, k - begin, None] * upper_KK[k, k + 1 : end]
        left_NK[:, end:] -= wrong @ upper_KK[begin:end, end:]
    spread = (zero_NG.repeat_interleave(GROUP, 1), scale_NG.repeat_interleave(GROUP, 1))
    wrong_NK = ((codes_NK - spread[0]) * spread[1] - weight_NK).double()
    return FourBits(codes_NK, zero_NG, scale_NG, float(((wrong_NK @ hessian_KK.double()) * wrong_NK).sum()))


def _grids(weight_NK: Tensor, importance_K: Tensor, stretches: Sequence[float] = STRETCHES) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point of every group, ``[N, G]`` each, with the least weighed square error of plain rounding."""
    rows = max(1, PIECE // weight_NK.shape[1])
    found = [_searched(part, importance_K, stretches) for part in weight_NK.split(rows)]
    scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scale, zero


def _searched(weight_NK: Tensor, importance_K: Tensor, stretches: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The same for some rows."""
    w = weight_NK.reshape(len(weight_NK), -1, GROUP)
    importance = importance_K.reshape(1, -1, GROUP)
    low, high = w.amin(-1, keepdim=True).clamp_max(0), w.amax(-1, keepdim=True).clamp_min(0)
    width = ((high - low) / LEVELS).clamp_min(1e-12)
    exact = (-low / width).round()
    best = torch.full_like(low, torch.inf)
    scale, zero = width.clone(), exact.clone()
    for offset in range(-REACH, REACH + 1):
        candidate = exact + offset
        allowed = (candidate >= 0) & (candidate <= LEVELS)
        for stretch in stretches:
            tried = width * stretch
            wrong = ((w / tried + candidate).round().clamp(0, LEVELS) - candidate) * tried - w
            error = torch.where(allowed, (importance * wrong.square()).sum(-1, keepdim=True), torch.inf)
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
            zero = torch.where(better, candidate, zero)
    return scale.squeeze(-1), zero.squeeze(-1)
