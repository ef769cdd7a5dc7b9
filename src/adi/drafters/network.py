"""The drafter: a small recurrent network that reads the last verified position's deep state and predicts what comes next.

``state' = norm(u + MLP(u))`` with ``u = mix [norm(x), state]``: ``x`` is the embedding of the token that has just been
chosen, ``state`` the model's own last state, normed, at the position before it, and from the
second draft on what the drafter itself gave. The model's own head, cut down to a shortlist and with one more output for
the tail, reads ``state'``. So the slow loop's result feeds a fast loop that then feeds itself: no attention, no KV memory,
and a rejected draft leaves nothing to undo.

Feature-level drafting: EAGLE (Li et al. 2024); a recurrent drafter over the last state: Cheng et al. 2024 (ReDrafter),
Hydra heads (Ankner et al. 2024); training it on its own states: HASS (Zhang et al. 2024), EAGLE-3 (Li et al. 2025).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from adi.exits import heads
from adi.exits.heads import Shortlist, shortlist
from adi.exits.signals import Prediction
from adi.model.arrays import Array, as_array, as_tensor, digest, joined, normalise, own_array
from adi.model.backbone import Backbone, ReadOut, States, TensorFunction

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EPS = 1e-5
QUIET = 0.2  # the scale of the model's own MLP at first: it was made for another place


@dataclass(frozen=True)
class Drafter:
    """Weights of the network, for the shortlist ``ids_S``.

    ``shallow_D`` is the gain of the token's normed state, ``mix_DE`` ``[D, 2D]`` reads it and the deep state side by side;
    ``gain_D``, ``gate_FD``, ``up_FD`` and ``down_DF`` are a gated MLP, ``out_D`` and ``shift_D`` the last norm; ``tail_D`` and
    ``tail_bias`` give one more logit for what is not in the shortlist. Arrays as a file gives them, or tensors.
    """

    ids_S: Array
    shallow_D: Array
    mix_DE: Array
    gain_D: Array
    gate_FD: Array
    up_FD: Array
    down_DF: Array
    out_D: Array
    shift_D: Array
    tail_D: Array
    tail_bias: Array

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: as_tensor(getattr(self, f.name)) for f in fields(self)}

    def arrays(self) -> dict[str, Any]:
        return {f.name: as_array(getattr(self, f.name)) for f in fields(self)}

    def map(self, change: Any) -> Drafter:
        """The same drafter in tensors, with ``change`` applied to every weight."""
        tensors = self.tensors()
        return Drafter(**{name: tensor if name == "ids_S" else change(tensor) for name, tensor in tensors.items()})

    def digest(self, *code: str) -> str:
        """16 hexadecimal digits that change with any weight, and with these source files."""
        return digest(self.arrays().values(), *code)


def shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """The shape that each weight must have, ``ids_S`` apart."""
    vector, wide = (width,), (hidden, width)
    return {
        "shallow_D": vector,
        "mix_DE": (width, 2 * width),
        "gain_D": vector,
        "gate_FD": wide,
        "up_FD": wide,
        "down_DF": (width, hidden),
        "out_D": vector,
        "shift_D": vector,
        "tail_D": vector,
        "tail_bias": (1,),
    }


def fresh_drafter(
    readout: ReadOut, ids_S: Tensor, hidden: int, generator: torch.Generator, mlp: Mapping[str, Tensor] | None = None
) -> Drafter:
    """A drafter before training: half token, half deep state, and a gated MLP with little weight yet.

    ``mlp`` may give it the model's own, ``gain_D``, ``gate_FD``, ``up_FD`` and ``down_DF``, in the place of random weights.
    """
    import torch

    readout = readout.tensors()
    width = readout.gain_D.shape[0]

    def noise(rows: int, columns: int, size: float) -> Tensor:
        drawn: Tensor = size * torch.randn(rows, columns, generator=generator) / columns**0.5
        return drawn

    half = 0.5 * torch.eye(width)
    drawn = {
        "gain_D": torch.ones(width),
        "gate_FD": noise(hidden, width, 1.0),
        "up_FD": noise(hidden, width, 1.0),
        "down_DF": noise(width, hidden, 0.1),
    }
    own = drawn if mlp is None else {**mlp, "down_DF": QUIET * mlp["down_DF"]}
    return Drafter(
        ids_S=ids_S,
        shallow_D=torch.ones(width),
        mix_DE=torch.cat([half, half], 1) + noise(width, 2 * width, 0.1),
        **own,
        out_D=readout.gain_D.clone(),
        shift_D=readout.shift_D.clone(),
        tail_D=torch.zeros(width),
        tail_bias=torch.zeros(1),
    )


def first_state(readout: ReadOut, deep_TD: Array) -> Array:
    """What drafting starts from: the model's final norm of the last verified positions' deep states, ``[T, D]``."""
    return normalise(deep_TD, readout.norm, readout.eps) * readout.gain_D + readout.shift_D


def advance(net: Drafter, readout: ReadOut, x_TD: Tensor, state_TD: Tensor) -> Tensor:
    """One step: shallow states of the newest tokens and the states before them give the next states, ``[T, D]``."""
    import torch
    from torch.nn.functional import linear, silu

    shallow_TD = normalise(x_TD.float(), "rms", EPS) * net.shallow_D
    u = linear(torch.cat([shallow_TD, state_TD], -1), net.mix_DE)
    n = normalise(u, "rms", EPS) * net.gain_D
    u = u + linear(silu(linear(n, net.gate_FD)) * linear(n, net.up_FD), net.down_DF)
    next_TD: Tensor = normalise(u, readout.norm, readout.eps) * net.out_D + net.shift_D
    return next_TD


def predict(net: Drafter, among: Shortlist, state_TD: Tensor) -> Prediction:
    """What the model's own head, cut down to the shortlist, reads from the drafter's states."""
    return among.prediction(state_TD, *among.with_tail(net.tail_D, net.tail_bias))


def step_function(net: Drafter, readout: ReadOut) -> TensorFunction:
    """A step as an engine compiles it, on the device of the model's own head: shallow and deep states to places of the
    likeliest tokens in the shortlist, their log-probabilities, and the next states."""
    readout = readout.tensors()
    among = shortlist(readout, net.ids_S)
    moved = net.map(lambda weight: weight.to(readout.weight_VD.device))
    rows = among.with_tail(moved.tail_D, moved.tail_bias)

    def run(x_TD: Tensor, state_TD: Tensor) -> tuple[Tensor, ...]:
        next_TD = advance(moved, readout, x_TD, state_TD)
        best = among.prediction(next_TD, *rows).log_probs_TS.topk(1)
        return best.indices[:, 0], best.values[:, 0], next_TD

    return run


@dataclass(frozen=True)
class DraftGuess:
    """The token that the drafter predicts."""

    token: int
    signals: Mapping[str, float]
    depth: int = 0


class Drafting:
    """A drafter at work beside one model, as a function of its engine. Holds no sequence's state."""

    def __init__(self, net: Drafter, backbone: Backbone) -> None:
        readout = backbone.readout()
        self._embed = weakref.WeakMethod(backbone.embed)  # or the memory of drafters would keep its own keys alive
        self._ids: list[int] = net.ids_S.tolist()
        self._readout = replace(readout, gain_D=own_array(readout.gain_D), shift_D=own_array(readout.shift_D))
        name = f"drafter-{net.digest(__file__, heads.__file__)}"
        self._step = backbone.compile(name, lambda: step_function(net, readout), [backbone.spec.width] * 2)
        self.key = f"{len(net.gate_FD)}x{len(net.ids_S)}"  # tells drafters apart that cost differently

    def try_once(self) -> None:
        """One step on nothing, to be timed."""
        self.step([0], self.start(self._alive()((0,))))

    def start(self, states: States) -> Array:
        """The state to draft from after a position whose deep state is this, of one row."""
        return first_state(self._readout, states.head_TD)

    def step(self, tokens: Sequence[int], state_TD: Array) -> tuple[list[DraftGuess], Array]:
        """What comes after each of the ``tokens``, of one or more texts, which follow the positions of ``state_TD``; and the
        states from which to go on. A probability is NaN where the drafter holds no distribution."""
        alive = self._alive()
        embedded = [alive((token,)).raw_TD for token in tokens]
        places, logs, state_TD = self._step(embedded[0] if len(tokens) == 1 else joined(embedded), state_TD)
        pairs = zip(places.tolist(), logs.tolist(), strict=True)
        return [DraftGuess(self._ids[place], {"top_probability": math.exp(log)}) for place, log in pairs], state_TD

    def _alive(self) -> Callable[[Sequence[int]], States]:
        embed = self._embed()
        assert embed is not None, "a drafter outlived its model"
        return embed
