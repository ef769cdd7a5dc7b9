"""What decoding reports: one ``Step`` per token, joined to a ``Generation``. Steps and summaries go to JSON and back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Any

from msgspec import Meta

from adi.risk.free_energy import FreeEnergy
from adi.schema import Int, Natural, Record

Level = Annotated[str, Meta(pattern="^(memory|drafter|exit|full)$")]
"""What proposed a token: n-gram memory and drafter (both at depth 0), an early exit, or full depth itself."""


class Candidate(Record, frozen=True):
    """A token that a depth considered, with its probability there."""

    token: Int
    text: str
    probability: float


class Look(Record, frozen=True):
    """One depth evaluated for one position: the token it predicts, its signals, and whether the trigger fired. ``surprise``
    is that of the final token there, -log p in nats, where a price was given."""

    depth: Natural
    token: Int | None
    text: str
    fired: bool
    signals: Mapping[str, float]
    candidates: tuple[Candidate, ...]
    surprise: float | None = None


class Draft(Record, frozen=True):
    """A token proposed at ``depth`` and not yet verified; ``level`` is what proposed it: "memory", "drafter" or "exit"."""

    token: Int
    text: str
    depth: Natural
    level: Level = "exit"


class Step(Record, frozen=True):
    """One token of the output.

    ``depth`` is the number of blocks that had run when the token was chosen, ``level`` what proposed it: "memory" (n-grams,
    depth 0), "drafter" (depth 0), "exit" or "full". ``drafted``: it was proposed early; ``accepted``: and full depth agreed.
    ``rejected`` are drafts thrown away at this position and after it, the first of them replaced by this token. ``signals``
    are those of the depth that decided; ``looks`` all depths read, where ``logprobs`` are asked for. ``seconds`` is wall-clock
    since the call, until the token was final.

    With a ``price``, in nats for a full pass: ``surprise`` is -log p of the token, by full depth where that has run, and
    ``price`` what the depth that gave it costs; their sum is its free energy. ``regret`` is by how much the best of the depths
    looked at would have been lower: each by its own surprise, the one that was taken by full depth's word.
    """

    index: Natural
    token: Int
    text: str
    depth: Natural
    level: Level
    round: Natural
    drafted: bool
    accepted: bool
    signals: Mapping[str, float]
    looks: tuple[Look, ...]
    rejected: tuple[Draft, ...]
    seconds: float
    surprise: float | None = None
    price: float | None = None
    regret: float | None = None

    @property
    def logprobs(self) -> dict[int, float]:
        """Log-probabilities by token, at the depth that decided and before penalties and temperature: of the likeliest tokens,
        best first, and of this one; empty unless asked for."""
        found = self.looks[-1].candidates if self.looks else ()
        return {one.token: math.log(one.probability) if one.probability > 0 else -math.inf for one in found}


@dataclass(frozen=True)
class Drafted:
    """An event: a token was put forward; it may yet be taken back."""

    draft: Draft


@dataclass(frozen=True)
class Rejected:
    """An event: the last ``count`` drafts were rejected."""

    count: int


@dataclass(frozen=True)
class Drift:
    """What spot checks of a reflex found: of this generation's ``checked`` tokens, ``differed`` differ from full depth's.

    ``level`` is the bound watched over, as a share of tokens or of a clipped loss. ``checked_ever`` counts all checks of the
    monitor; by them the running risk is above ``lower`` and below ``upper``, each at all times with the certificate's
    confidence. ``fell_back_at`` is the index of the first verified token, 0 where drift had been found before, None where the
    certificate holds.
    """

    level: float
    checked: int
    differed: int
    checked_ever: int
    lower: float
    upper: float
    fell_back_at: int | None


@dataclass(frozen=True)
class DriftFound:
    """An event: the certificate does not hold on this text; from token ``index`` on decoding is verified."""

    index: int
    level: float
    lower: float


Event = Step | Drafted | Rejected | DriftFound


@dataclass(frozen=True)
class Counters:
    """What a generation cost. ``row_blocks`` counts rows x blocks, the prompt's included; ``block_passes`` blocks run,
    however many rows each carried; ``rounds`` passes that reached full depth; ``reused`` tokens of the prompt that a prefix
    cache had."""

    rounds: int
    drafted: int
    accepted: int
    row_blocks: int
    block_passes: int
    seconds: float
    reused: int = 0


class Summary(Record, frozen=True):
    """The figures of one generation, as ``adi run --json`` prints them.

    ``block_rows_full`` and ``block_passes_full`` are what full depth needs for the same tokens. ``free_energy`` is None where
    no price was given.
    """

    mode: str
    model: str
    backend: str
    precision: str
    tokens: Natural
    rounds: Natural
    drafted: Natural
    accepted: Natural
    mean_depth: float
    depth_histogram: Mapping[str, Natural]
    block_rows: Natural
    block_rows_full: Natural
    block_passes: Natural
    block_passes_full: Natural
    seconds: float
    tokens_per_second: float
    finish: str
    calibrated: bool
    free_energy: FreeEnergy | None = None

    def __str__(self) -> str:
        share = ""
        if self.drafted and self.mode != "reflex":
            share = f"{self.accepted} of {self.drafted} drafts accepted ({self.accepted / self.drafted:.0%}), "
        passes, rows = (
            f"{ours / max(1, full):.0%}"
            for ours, full in ((self.block_passes, self.block_passes_full), (self.block_rows, self.block_rows_full))
        )
        free = "" if self.free_energy is None else f"; {self.free_energy}"
        return (
            f"{self.tokens} tokens in {self.rounds} rounds, {share}mean depth {self.mean_depth:.1f}, "
            f"{passes} of full depth's block passes and {rows} of its block-rows, "
            f"{self.tokens_per_second:.1f} tokens/s{free}"
        )


@dataclass(frozen=True)
class Generation:
    """A finished text. ``finish`` is "eos", "stop" or "length"; ``str()`` of it is the text. ``sampling`` holds the options
    that draw it again, seed included; None where it is greedy. ``verified``: full depth had the last word on every token. Else
    ``certified`` says what bounds the risk (None: nothing does), ``drift`` what spot checks found. ``full_price`` is the price
    that was given, nats for a full pass."""

    text: str
    token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    steps: tuple[Step, ...]
    mode: str
    model: str
    backend: str
    precision: str
    layers: int
    finish: str
    counters: Counters
    sampling: Mapping[str, Any] | None = None
    verified: bool = True
    certified: str | None = None
    drift: Drift | None = None
    full_price: float | None = None

    def __str__(self) -> str:
        return self.text

    def summary(self) -> Summary:
        """Tokens, rounds, acceptance, depths, cost and speed of this generation."""
        c, tokens = self.counters, len(self.steps)
        histogram = Counter(step.depth for step in self.steps)
        rows_full = (len(self.prompt_ids) + max(tokens - 1, 0)) * self.layers
        return Summary(
            mode=self.mode,
            model=self.model,
            backend=self.backend,
            precision=self.precision,
            tokens=tokens,
            rounds=c.rounds,
            drafted=c.drafted,
            accepted=c.accepted,
            mean_depth=sum(d * n for d, n in histogram.items()) / tokens if tokens else 0.0,
            depth_histogram={str(d): histogram[d] for d in sorted(histogram)},
            block_rows=c.row_blocks,
            block_rows_full=rows_full,
            block_passes=c.block_passes,
            block_passes_full=tokens * self.layers,
            seconds=c.seconds,
            tokens_per_second=tokens / c.seconds if c.seconds > 0 else 0.0,
            finish=self.finish,
            calibrated=self.verified or self.certified is not None,
            free_energy=self._free_energy(),
        )

    def _free_energy(self) -> FreeEnergy | None:
        """Means over the steps; None without a price, for no tokens, and where a token had no chance."""
        known = [(s.surprise, s.price, s.regret) for s in self.steps if s.surprise is not None and math.isfinite(s.surprise)]
        if self.full_price is None or not known or len(known) < len(self.steps):
            return None
        surprise, price, regret = (fmean(value or 0.0 for value in column) for column in zip(*known, strict=True))
        share = fmean(step.depth for step in self.steps) / self.layers
        return FreeEnergy(surprise + price, surprise, price, share, regret, self.full_price)
