"""What one depth shows of one row, computed only as far as a trigger reads it.

A trigger that reads stability before entropy pays for the head only where stability is high enough.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from adi.errors import ModelError, NoDistributionError
from adi.exits.probe import NETWORKS, networks_of, require_network
from adi.exits.signals import SIGNALS, Prediction, require_signal
from adi.model.backbone import States

if TYPE_CHECKING:
    from torch import Tensor

    from adi.exits.probe import Probe


class Signals(Mapping[str, float]):
    """Names to values of one row, each measured on first use and kept in ``seen``."""

    def __init__(self, depth: int, predict: Callable[[], Prediction], states: States, probe: Probe | None) -> None:
        self.seen: dict[str, float] = {}
        self._depth, self._predict, self._states, self._probe = depth, predict, states, probe

    def __getitem__(self, name: str) -> float:
        if name not in self.seen:
            self.seen[name] = self._measure(name)
        return self.seen[name]

    def __iter__(self) -> Iterator[str]:
        there = {"head", "states", *(["mlp"] if self._states.mlp_TF is not None else []), *networks_of(self._probe)}
        return (name for name, signal in SIGNALS.items() if signal.reads in there)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _measure(self, name: str) -> float:
        signal, states = require_signal(name), self._states
        if signal.reads == "head":
            return float(signal.measure(self._predict()))
        if signal.reads == "states":
            return float(signal.measure(states.before_TD, states.hidden_TD))
        if signal.reads in NETWORKS:
            require_network(name, self._probe)
            return float(signal.measure(self._probe, self._depth, states.hidden_TD, self._predict))
        if states.mlp_TF is None:
            raise ModelError(f"signal {name!r} needs MLP activations, which this model does not show (experts, or no MLP).")
        return float(signal.measure(states.mlp_TF))


def _of_logits(logits_V: Tensor) -> Prediction:
    return Prediction(logits_V[None].log_softmax(-1))


class _Once:
    """What ``make`` gives, made on first use; ``functools.cache`` itself takes ten times as long to make."""

    __slots__ = ("_made", "_make")

    def __init__(self, make: Callable[[], Prediction]) -> None:
        self._make = make
        self._made: Prediction | None = None

    def __call__(self) -> Prediction:
        if self._made is None:
            self._made = self._make()
        return self._made


class ExitOutput:
    """One row at one depth, whose states these are: its likeliest token, its candidates and its signals.

    ``token`` may be given where it is known without the whole distribution, ``logits_V`` where they are at hand.
    """

    def __init__(
        self,
        depth: int,
        predict: Callable[[], Prediction],
        states: States,
        token: int | None = None,
        logits_V: Tensor | None = None,
        probe: Probe | None = None,
    ) -> None:
        self.depth = depth
        self._logits_V = logits_V
        self._token = token
        # Without a reference to self: logits in a cycle would wait for the garbage collector, which counts no bytes.
        self._prediction = _Once(predict if logits_V is None else functools.partial(_of_logits, logits_V))
        self.signals: Mapping[str, float] = Signals(depth, self._prediction, states, probe)

    @property
    def prediction(self) -> Prediction:
        return self._prediction()

    @property
    def scores(self) -> tuple[Tensor, Tensor | None]:
        """What sampling starts from, ``[S]``, and the tokens that they belong to (None: all of the vocabulary): the model's own
        logits, or an exit's log-probabilities."""
        if self._logits_V is not None:
            return self._logits_V, None
        return self.prediction.log_probs_TS[0], self.prediction.ids_S

    @property
    def token(self) -> int:
        """The likeliest token that the head can name; NoDistributionError where that is NaN."""
        if self._token is None:
            log = float(self.prediction.rows.first_T[0])
            if not math.isfinite(log):
                raise NoDistributionError(
                    f"the exit at depth {self.depth} holds no distribution: its largest log-probability is {log}."
                )
            self._token = int(self.prediction.tokens_T[0])
        return self._token

    def candidates(self, count: int, token: int | None = None) -> tuple[tuple[int, float], ...]:
        """The ``count`` likeliest tokens with their probabilities, and ``token`` after them where it is none of them."""
        logs, ids_S = self.prediction.log_probs_TS[0], self.prediction.ids_S
        values, places = logs.topk(min(count, logs.shape[0]))
        found = dict(zip((places if ids_S is None else ids_S[places]).tolist(), map(math.exp, values.tolist()), strict=True))
        if token is not None and token not in found:
            found[token] = float(self._named(token).double().exp().sum())
        return tuple(found.items())

    def surprise(self, token: int) -> float:
        """-log p of a token in nats; one that a shortlist does not name has its share of the tail."""
        named, of = self._named(token), self.prediction
        if len(named):
            return -float(named[0])
        return math.inf if of.tail_T is None else math.log(max(of.tail_size, 1)) - float(of.tail_T[0])

    def _named(self, token: int) -> Tensor:
        """Its log-probability, ``[1]``, or ``[0]`` where a shortlist does not name it."""
        logs, ids_S = self.prediction.log_probs_TS[0], self.prediction.ids_S
        return logs[token : token + 1] if ids_S is None else logs[ids_S == token]
