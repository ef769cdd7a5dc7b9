"""Sampling without loss: from logits to the distribution that is drawn from, and the draw that judges a draft.

The distribution is made as transformers makes it, in its order: processors, temperature, top-k, top-p, min-p. Every
final token takes exactly one number from the sequence's own dice, whoever drafted:

* A draft that follows from what is known before (a memory, the drafter, an exit's likeliest token) was drawn from a point mass,
  for which the rule of Leviathan et al. 2023 and Chen et al. 2023 reads: keep it with the chance ``p(d)`` that full depth
  gives it, else draw from ``p`` without it. That is a single draw from ``p``, kept if it is the draft: the draw says ``d`` with
  chance ``p(d)``, and given that it does not, it is distributed as ``p`` without ``d``. So the token depends on the text and on
  its number alone, not on what was drafted: full depth and verified say the same from the same seed.
* A draft drawn from a density ``q`` is kept with chance ``min(1, p(d) / q(d))``, else replaced by a draw from the residual
  ``max(p - q, 0)``, renormalised.

What decides whether a draft is made, and how deep, may look at anything but the number that will judge it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adi.decoding.processors import LogitsProcessor, processed
from adi.decoding.sampling import Sampling
from adi.errors import NoDistributionError, UsageError
from adi.model.backbone import require_number

if TYPE_CHECKING:
    from adi.decoding.requests import DraftToken

LEADING = 512  # tokens looked at first where a nucleus is sought


def distribution(scores_V: Tensor, sampling: Sampling) -> Tensor:
    """What is drawn from, ``[V]`` in float64 on the CPU: exact zeros where a filter removed a token.

    At temperature 0 all mass is on the first of the largest. Raises NoDistributionError for scores that hold none (NaN, or an
    infinite one).
    """
    scores_V = scores_V.detach().to("cpu", torch.float64)
    top = float(scores_V.max())  # NaN where any is
    require_number([top])
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(scores_V.argmax(), len(scores_V)).double()
    scores_V = (scores_V - top) / sampling.temperature
    if sampling.top_k is not None:
        scores_V = top_k(scores_V, sampling.top_k)
    p_V = scores_V.softmax(-1)
    if sampling.top_p < 1:
        p_V = top_p(p_V, sampling.top_p)
    return min_p(p_V, sampling.min_p) if sampling.min_p > 0 else p_V


def top_k(scores_V: Tensor, count: int) -> Tensor:
    """Scores with -inf below the ``count``-th largest; what ties with it stays."""
    least = scores_V.topk(min(count, len(scores_V))).values[-1]
    return scores_V.masked_fill(scores_V < least, -math.inf)


def top_p(p_V: Tensor, share: float) -> Tensor:
    """The nucleus, renormalised: a token stays if those likelier than it (of equals, those of a lower id) have less than
    ``share`` together. The likeliest always stays."""
    for count in (min(LEADING, len(p_V)), len(p_V)):
        least = p_V.topk(count).values[-1]
        among_N = (p_V >= least).nonzero()[:, 0]  # in the order of their ids, so that a stable sort settles ties
        likely_N, order_N = p_V[among_N].sort(descending=True, stable=True)
        before_N = likely_N.cumsum(0) - likely_N
        if float(before_N[-1]) >= share:
            break
    keep_N = before_N < share
    keep_N[0] = True
    kept_V = torch.zeros_like(p_V)
    chosen_N = among_N[order_N[keep_N]]
    kept_V[chosen_N] = p_V[chosen_N]
    return kept_V / kept_V.sum()


def min_p(p_V: Tensor, share: float) -> Tensor:
    """What has at least ``share`` of the likeliest token's probability, renormalised."""
    kept_V = torch.where(p_V < share * p_V.max(), torch.zeros_like(p_V), p_V)
    return kept_V / kept_V.sum()


def draw(weight_V: Tensor, number: float) -> int:
    """The token that ``number`` in [0, 1) stands for under these weights, laid end to end; never one of weight zero."""
    ends_V = weight_V.cumsum(0)
    place = int(torch.searchsorted(ends_V, number * float(ends_V[-1]), right=True))
    return place if place < len(weight_V) else int(weight_V.nonzero()[-1])  # rounding at the very end


def verify_draft(p_V: Tensor, q_V: Tensor, draft: int, number: float) -> int:
    """The token that stands where ``draft`` was drawn from ``q_V``: the draft itself with chance ``min(1, p / q)``, else a draw
    from the residual; distributed as ``p_V``. One number in [0, 1) serves both, since what is left of it is spread evenly."""
    if float(q_V[draft]) <= 0:
        raise UsageError(f"token {draft} cannot have been drawn from a density that gives it {float(q_V[draft])}.")
    chance = min(1.0, float(p_V[draft] / q_V[draft]))
    if number < chance:
        return draft
    residual_V = (p_V - q_V).clamp_min(0)
    if float(residual_V.sum()) <= 0:  # p and q differ by rounding alone
        return draft
    return draw(residual_V, (number - chance) / (1 - chance))


class Sampler:
    """The rule by which one sequence's tokens become final (``requests.TokenRule``) when it samples, from a seed, or when
    ``processors`` change the logits first, over a ``vocabulary``.

    Full depth's row is read as logits over the vocabulary. Where an exit decides (reflex mode), its own distribution is drawn
    from: of a shortlist head the tail cannot be named, so the shortlist, renormalised, stands for all; processors then act on
    log-probabilities, which is all that such a head tells.
    """

    def __init__(self, sampling: Sampling, processors: Sequence[LogitsProcessor] = (), vocabulary: int = 0) -> None:
        self.sampling, self.processors, self.vocabulary = sampling.settled(), processors, vocabulary
        assert self.sampling.seed is not None
        self._rng = torch.Generator().manual_seed(self.sampling.seed)  # its own: the caller's are not touched

    def __call__(self, text: Sequence[int], reading: Any, draft: DraftToken | None = None) -> int:
        """The token that follows ``text``; it takes one random number, however it goes, but none where it is greedy."""
        scores_S, ids_S = reading.scores
        if self.processors:
            scores_S, ids_S = self._processed(text, scores_S, ids_S), None
        if self.sampling.temperature == 0:
            require_number([float(scores_S.max())])
            place = int(scores_S.argmax())
            return place if ids_S is None else int(ids_S[place])
        p_S = self.distribution(scores_S, text)
        if draft is None or draft.density_V is None:
            place = draw(p_S, self.number())
            return place if ids_S is None else int(ids_S[place])
        assert ids_S is None, "drafts are judged by full depth"
        return verify_draft(p_S, draft.density_V, draft.token, self.number())

    def _processed(self, text: Sequence[int], scores_S: Tensor, ids_S: Tensor | None) -> Tensor:
        """Scores over the vocabulary, changed by the processors; what a shortlist does not name is ruled out."""
        if ids_S is not None:
            whole = torch.full((self.vocabulary,), -math.inf, device=scores_S.device)
            scores_S = whole.index_copy(0, ids_S.to(whole.device), scores_S.float())
        scores_V = processed(self.processors, text, scores_S)
        if float(scores_V.max()) == -math.inf:
            raise NoDistributionError(
                f"after {len(text)} tokens no token is left to choose: logits processors, bad words and the like rule out all."
            )
        return scores_V

    def distribution(self, scores_S: Tensor, text: Sequence[int]) -> Tensor:
        """What is drawn from after ``text``."""
        return distribution(scores_S, self.sampling)

    def number(self) -> float:
        """The next random number, in [0, 1)."""
        return float(torch.rand((), dtype=torch.float64, generator=self._rng))
