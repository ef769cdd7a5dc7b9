"""``Sampling``: how tokens are drawn, as a frozen value; ``decoding.sampler`` draws by it. Needs no torch."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from adi.arguments import real, settle, whole
from adi.errors import UsageError

SEEDS = 2**63
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("0 (greedy) or more, such as 0.7", lambda t: t >= 0),
    "top_p": ("above 0 and at most 1 (1 keeps every token)", lambda p: 0 < p <= 1),
    "min_p": ("from 0 (keeps every token) to 1", lambda p: 0 <= p <= 1),
    "repetition_penalty": ("above 0 (1 changes nothing)", lambda p: p > 0),
    "frequency_penalty": ("such as 0.5 (0 changes nothing)", lambda p: True),
    "presence_penalty": ("such as 0.5 (0 changes nothing)", lambda p: True),
}
DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
WHOLE = (
    ("top_k", 1, None, "every token"),
    ("seed", 0, SEEDS - 1, "a new one"),
    ("no_repeat_ngram_size", 0, None, "the model's own"),
    ("min_new_tokens", 0, None, "the model's own"),
)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The default is greedy: ``temperature`` 0, the limit in which the likeliest token has all the mass.

    ``temperature`` divides the logits. ``top_k`` keeps that many likeliest tokens (and what ties with the last of them),
    ``top_p`` the fewest likeliest tokens that together have at least that probability (Holtzman et al. 2020), ``min_p`` those
    with at least that share of the likeliest one's (Nguyen et al. 2024). ``seed`` starts the sequence's own generator; None
    takes a fresh one from the system.

    The others act on greedy decoding too, before the temperature, in the place of the model's own generation config where they
    are given. ``repetition_penalty`` divides positive logits of tokens of the text so far, prompt included, and multiplies
    negative ones (Keskar et al. 2019). ``frequency_penalty`` is subtracted for each time that a token was generated,
    ``presence_penalty`` once. ``no_repeat_ngram_size``: no n-gram of that size stands twice in prompt and text.
    ``min_new_tokens``: no end token comes before. ``bad_words``: texts, or their token ids, that are never written.
    ``logit_bias``: what is added to the logits of tokens, by token id. UsageError for values out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    no_repeat_ngram_size: int | None = None
    min_new_tokens: int | None = None
    bad_words: Sequence[str | Sequence[int]] = ()
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        for name, (allowed, fits) in RANGES.items():
            if name != "repetition_penalty" or self.repetition_penalty is not None:
                settle(self, **{name: real(name, getattr(self, name), allowed, fits)})
        for name, least, most, otherwise in WHOLE:
            if (given := getattr(self, name)) is not None:
                settle(self, **{name: whole(name, given, least, most, f", or None for {otherwise}")})
        if isinstance(self.bad_words, str) or not all(self.bad_words):
            raise UsageError(f"bad_words is {self.bad_words!r}; it must be a list of texts, or of lists of token ids.")
        for token, bias in (self.logit_bias or {}).items():
            real(f"logit_bias of {token!r}", bias, "such as -100", lambda b: True)
        cut = {"top_k": (self.top_k, None), "top_p": (self.top_p, 1), "min_p": (self.min_p, 0)}
        if self.temperature == 0 and (idle := [f"{name}={v}" for name, (v, rest) in cut.items() if v != rest]):
            raise UsageError(
                f"{', '.join(idle)} means nothing at temperature 0, which is greedy; give a temperature, such as 1."
            )

    @property
    def plain(self) -> bool:
        """Whether it leaves ordinary greedy decoding as it is, for which nobody needs whole logits."""
        return self == Sampling(seed=self.seed)

    @property
    def draws(self) -> bool:
        """Whether it asks for anything but the likeliest token of the logits as a generation config leaves them."""
        return self.temperature > 0 or bool(self.frequency_penalty or self.presence_penalty)

    def settled(self) -> Sampling:
        """The same with a seed: its own, or a new one from the system where it had none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(63))

    def of_prompt(self, index: int) -> Sampling:
        """The same for one prompt of a batch, under that prompt's own seed (``prompt_seed``)."""
        return self if self.seed is None else replace(self, seed=prompt_seed(self.seed, index))

    def to_json(self) -> dict[str, Any]:
        """How tokens are drawn, and of the penalties and the like those that are given."""
        idle = Sampling()
        return {name: value for name, value in asdict(self).items() if name in DRAWING or value != getattr(idle, name)}


def prompt_seed(seed: int, index: int) -> int:
    """The seed of prompt ``index`` of a batch: ``generate(..., seed=prompt_seed(seed, i))`` gives the same text alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "big") % SEEDS
