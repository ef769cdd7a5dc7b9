"""Teacher forcing: run known texts once through the model, stopped at chosen depths, and read every exit there.

Every measurement and all training starts from it. An early state is a function of the text alone, since skipped blocks are
filled in exactly, so one pass over a finished answer gives what an exit would have predicted at each of its tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from adi.artifact import Exits
from adi.decoding.generate import generate_batch
from adi.decoding.passes.sharing import sharing
from adi.decoding.policies import FullDepth
from adi.decoding.records import Generation
from adi.exits.probe import networks_of
from adi.exits.signals import Prediction, entropy, top_probability
from adi.model.backbone import Backbone, Rows, States
from adi.model.load import Model
from adi.model.prompt import Prompt

MOST_TEXTS = 16  # that hold KV memory at a time
READ: dict[str, Callable[[Prediction], Tensor]] = {"top_probability": top_probability, "entropy": entropy}


@dataclass(frozen=True)
class KnownText:
    """Tokens to run. The row of token ``i`` predicts token ``i + 1``; rows from ``first`` on are handed out.

    The first ``prefill`` rows (None: all) are read as a prompt is; those behind them go in passes of at most
    ``Spec.merged_rows`` rows, which give the bits of decoding token by token on an engine whose rows are invariant.
    """

    ids: tuple[int, ...]
    first: int = 0
    prefill: int | None = None

    @classmethod
    def of_answer(cls, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> KnownText:
        """A prompt and its answer: handed out are the rows that predict the answer's tokens, as decoding computes them."""
        return cls((*prompt_ids, *token_ids)[:-1], len(prompt_ids) - 1, len(prompt_ids))


@dataclass(frozen=True)
class ForcedPass:
    """The N rows of a text that were asked for, by depth: ``hidden`` is the state that left the last block run, ``[N, D]``.

    Where details were asked for, ``before`` is the state that entered that block, ``[N, D]``, and ``mlp`` its MLP
    activations, ``[N, F]``, on an engine that shows them; otherwise both are empty. Full depth is always there.
    """

    text: KnownText
    hidden: Mapping[int, Tensor]
    before: Mapping[int, Tensor]
    mlp: Mapping[int, Tensor]

    @property
    def deep_ND(self) -> Tensor:  # noqa: N802, a shape
        """The states at full depth."""
        return self.hidden[max(self.hidden)]


def forced_pass(
    backbone: Backbone, texts: Iterable[KnownText], depths: Sequence[int] = (), *, details: bool = False
) -> Iterator[ForcedPass]:
    """Run texts to full depth, stopping at ``depths`` on the way; one ``ForcedPass`` for each text, in their order.

    Several texts share a pass where they fit in ``Spec.merged_rows`` rows. At most 16 texts are under way at a time, so
    results may be written to disk as they come. MemoryFullError where KV memory is too small for a text alone.
    """
    spec = backbone.spec
    stops, mlp = (*sorted({*depths} - {spec.layers}), spec.layers), details and backbone.has_mlp_tap
    given, running = iter(texts), deque[_RunningText]()
    waiting, most = next(given, None), 1  # an engine knows what a position takes of KV memory once one text has run
    try:
        while waiting or running:
            while waiting and len(running) < most:
                running.append(_RunningText(backbone, waiting))
                if len(running) > 1 and not backbone.fits([(r.cache, len(r.text.ids)) for r in running if r.unfinished]):
                    running.pop().cache.close()
                    break
                waiting = next(given, None)
            unfinished, most = [one for one in running if one.unfinished], MOST_TEXTS
            together = sharing([one.end - one.start for one in unfinished], spec.merged_rows)
            chosen = [unfinished[i] for i in together]
            for depth, states in run_to_stops(backbone, [one.rows for one in chosen], stops, mlp=mlp):
                looked = _look(backbone, [one.rows for one in chosen], depth, states, mlp)
                for one, left in zip(chosen, looked, strict=True):
                    one.keep(depth, left, details)
            for one in chosen:
                one.advance()
            while running and not running[0].unfinished:
                yield running.popleft().result()
    finally:
        for one in running:
            one.cache.close()


def run_to_stops(
    backbone: Backbone, rows: Sequence[Rows], stops: Sequence[int], *, mlp: bool = False
) -> Iterator[tuple[int, list[States]]]:
    """Run rows that enter the first block from stop to stop; at each its depth and one ``States`` per entry of ``rows``."""
    for lo, hi in pairwise((0, *stops)):
        states = backbone.forward(rows, lo, hi, mlp=mlp)
        yield hi, states
        rows = [replace(row, states=left) for row, left in zip(rows, states, strict=True)]


def _look(backbone: Backbone, rows: Sequence[Rows], depth: int, states: list[States], mlp: bool) -> list[States]:
    """What a head reads at this depth; ``Frontier.look`` of rows that are all there."""
    for lo, hi in backbone.spec.tail(depth):
        entering = [replace(row, states=left) for row, left in zip(rows, states, strict=True)]
        states = backbone.forward(entering, lo, hi, mlp=mlp)
    return states


class _RunningText:
    """One text under way: its KV cache, where its next pass starts, and the parts of what is handed out."""

    def __init__(self, backbone: Backbone, text: KnownText) -> None:
        self.text, self.cache, self.start, self._spec = text, backbone.new_cache(), 0, backbone.spec
        self.prompt = len(text.ids) if text.prefill is None else min(len(text.ids), text.prefill)
        self._parts: dict[str, dict[int, list[Tensor]]] = {"hidden": {}, "before": {}, "mlp": {}}

    @property
    def unfinished(self) -> bool:
        return self.start < len(self.text.ids)

    @property
    def end(self) -> int:
        """Of the next pass."""
        if self.start < self.prompt:
            return self._spec.prompt_pass(self.start, self.prompt)
        return min(self.start + self._spec.merged_rows, len(self.text.ids))

    @property
    def rows(self) -> Rows:
        return Rows(self.cache, self.start, self.text.ids[self.start : self.end], None, self.start < self.prompt)

    def keep(self, depth: int, states: States, details: bool) -> None:
        shown = {"hidden": states.hidden_TD}
        if details:
            shown["before"] = states.before_TD
            if states.mlp_TF is not None:
                shown["mlp"] = states.mlp_TF
        for name, rows in shown.items():
            self._parts[name].setdefault(depth, []).append(rows[max(0, self.text.first - self.start) :])

    def advance(self) -> None:
        self.start = self.end
        if not self.unfinished:
            self.cache.close()

    def result(self) -> ForcedPass:
        whole = {name: {d: torch.cat(parts) for d, parts in kept.items()} for name, kept in self._parts.items()}
        return ForcedPass(self.text, **whole)


def full_logits(backbone: Backbone, deep_ND: Tensor, rows: int | None = None) -> Iterator[Tensor]:
    """The model's own head on states, ``[R, V]`` for some rows at a time: a vocabulary may have 262,144 tokens."""
    return (backbone.logits(part_RD) for part_RD in deep_ND.split(rows or backbone.spec.merged_rows))


def full_tokens(backbone: Backbone, deep_ND: Tensor) -> Tensor:
    """The full model's greedy tokens at these states, ``[N]``."""
    return torch.cat([logits_RV.argmax(-1).cpu() for logits_RV in full_logits(backbone, deep_ND)])


@dataclass(frozen=True)
class ForcedReading:
    """An answer of T tokens and what E exits predict at each.

    ``answer_T`` are the answer's own tokens, ``full_T`` full depth's in the same contexts, ``exit_ET`` the exits'.
    ``signals`` are each exit's top probability, entropy and, where it has one, gate, ``[E, T]``. ``regret_T`` and ``regret_ET``
    are by how much less likely than ``full_T`` the answer's and the exits' tokens are to the full model, in nats, at least 0.
    """

    prompt_ids: tuple[int, ...]
    answer_T: Tensor
    full_T: Tensor
    exit_ET: Tensor
    signals: Mapping[str, Tensor]
    regret_T: Tensor
    regret_ET: Tensor


def forced_readings(
    backbone: Backbone, exits: Exits | None, answers: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> list[ForcedReading]:
    """Read answers (each a prompt's and an answer's token ids) at every exit and at full depth; without ``exits`` at full
    depth alone. ValueError for another model's exits."""
    passes = forced_pass(backbone, [KnownText.of_answer(*one) for one in answers], () if exits is None else exits.depths)
    return [_reading(backbone, exits, *one, seen) for one, seen in zip(answers, passes, strict=True)]


def _reading(
    backbone: Backbone, exits: Exits | None, prompt_ids: tuple[int, ...], answer: tuple[int, ...], seen: ForcedPass
) -> ForcedReading:
    answer_T, depths = torch.tensor(answer), () if exits is None else exits.depths
    exit_ET = torch.zeros((len(depths), len(answer)), dtype=torch.long)
    gated = exits is not None and "gate" in networks_of(exits.probe)
    signals = {name: torch.zeros((len(depths), len(answer))) for name in (*READ, *(["gate"] if gated else []))}
    for e, depth in enumerate(depths):
        assert exits is not None
        head = exits.reader(backbone)(depth, seen.hidden[depth])
        exit_ET[e] = head.tokens_T.cpu()
        for name, measure in READ.items():
            signals[name][e] = measure(head).float().cpu()
        if exits.probe is not None and gated:
            signals["gate"][e] = exits.probe.chance("gate", depth, seen.hidden[depth]).cpu()
    full, regrets = list[Tensor](), list[Tensor]()
    tokens_RT = torch.cat([answer_T[None], exit_ET]).split(backbone.spec.merged_rows, 1)
    for logits_TV, wanted_RT in zip(full_logits(backbone, seen.deep_ND), tokens_RT, strict=True):
        full.append(logits_TV.argmax(-1).cpu())
        regrets.append((logits_TV.amax(-1, keepdim=True).cpu() - logits_TV.cpu().gather(1, wanted_RT.T)).T)
    regret_RT = torch.cat(regrets, 1)
    return ForcedReading(prompt_ids, answer_T, torch.cat(full), exit_ET, signals, regret_RT[0], regret_RT[1:])


def encoded(model: Model, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """The prompts' token ids, in the model's chat template where it has one."""
    raw = model.tokenizer is not None and not model.tokenizer.has_chat_template
    return [model.encode(prompt, raw=raw) for prompt in prompts]


def own_answers(model: Model, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Generation]:
    """The model's own greedy answers at full depth, all together."""
    return generate_batch(model, encoded(model, prompts), FullDepth(), max_new_tokens=max_new_tokens, most=MOST_TEXTS)
