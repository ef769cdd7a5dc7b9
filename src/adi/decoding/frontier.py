"""The frontier: every position's deepest state so far, and how many positions each layer has processed.

``filled`` never rises with depth: it is a staircase. One primitive, ``next_pass(to)`` with ``absorb`` (``advance`` does both
until all is done), runs for every layer below ``to`` the positions that this layer has not seen. Prefill, drafting, resuming
and verifying are all that one step, so no position runs a block twice on its way up (``look`` reads a tail ahead of its turn),
and nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from adi.model.backbone import KV_BLOCK, Backbone, Rows, States
from adi.model.prefix_cache import PrefixCache


@dataclass(frozen=True)
class BlockPass:
    """Blocks [lo, hi), which all stand at the same position, over the rows that they have not seen. One that is
    ``provisional`` is not absorbed: the true pass over these rows writes the same keys and values anew."""

    rows: Rows
    lo: int
    hi: int
    provisional: bool = False


@dataclass(frozen=True)
class HeadPass:
    """A request for the likeliest token of each of these states by the model's own head, or for all its ``logits``."""

    states: States
    logits: bool = False

    def run(self, backbone: Backbone) -> Any:
        """A token per row, or ``logits_TV``."""
        return backbone.logits(self.states) if self.logits else backbone.greedy(self.states)


class Frontier:
    """One sequence's progress through the layers.

    ``row_blocks`` counts rows times blocks run so far, ``block_passes`` blocks run however many rows they carried. The first
    ``prompt`` positions are a prompt's, and ``reused`` so many of them were not run but taken over from other texts.
    """

    def __init__(self, backbone: Backbone, *, mlp: bool = False) -> None:
        self.backbone = backbone
        self.ids: list[int] = []
        self.filled = [0] * backbone.spec.layers
        self.row_blocks = 0
        self.block_passes = 0
        self.prompt = self.reused = 0
        self.prefix_cache: PrefixCache | None = None
        self.last: States | None = None
        self.mlp = mlp
        self.cache = backbone.new_cache()
        self._runs: list[tuple[int, int, States]] = []  # newest positions, ascending, with their deepest states so far

    @property
    def length(self) -> int:
        return len(self.ids)

    def append(self, ids: Sequence[int]) -> None:
        """Put tokens at the end; nothing runs yet."""
        self.ids.extend(ids)

    def reuse(self, prefix_cache: PrefixCache, ids: Sequence[int]) -> None:
        """Begin with what is known of this prompt, which ``read`` will be given, and let others know what is found of it."""
        assert not self.ids
        self.prefix_cache = prefix_cache
        length, last = prefix_cache.begin(self.cache, ids, states=not self.mlp)  # which may hold no MLP activations
        self.ids, self.filled, self.reused = list(ids[:length]), [length] * len(self.filled), length
        if last is not None:
            self.last, self._runs = last, [(length - 1, length, last)]

    def read(self, ids: Sequence[int]) -> None:
        """Put a prompt at the beginning: its rows do not depend on the passes in which they run, nor on what was reused."""
        assert tuple(self.ids) == tuple(ids[: self.length])
        self.append(ids[self.length :])
        self.prompt = self.length

    def rollback(self, length: int) -> None:
        """Forget every position from ``length`` on."""
        assert 0 <= length <= self.length, f"cannot roll back from {self.length} to {length}"
        del self.ids[length:]
        self.prompt = min(self.prompt, length)
        self.filled = [min(f, length) for f in self.filled]
        self._forget(length)

    def next_pass(self, to: int) -> BlockPass | None:
        """The lowest blocks below ``to`` that lag behind, as many as stand level; None when all have caught up. A part of a
        prompt comes to that depth before the next one begins; blocks that keep nothing of it run for its last row alone."""
        if to == 0 or self.filled[to - 1] == self.length:  # it never rises with depth, so the last one tells for all
            return None
        deep, lo, hi = self.filled[to - 1], 0, to
        end = self.length if deep >= self.prompt else self.backbone.spec.prompt_pass(deep, self.prompt)
        if self.filled[0] != deep:
            lo = next(layer for layer in range(to) if self.filled[layer] < end)
            hi = next((layer for layer in range(lo, to) if self.filled[layer] != self.filled[lo]), to)
        start, keeps = self.filled[lo], self.backbone.spec.keeps_below
        if keeps is not None and lo < keeps and start < self.prompt and end - start > 1:
            hi = min(hi, keeps)
        entering = self.states(start, end) if lo else None
        return BlockPass(Rows(self.cache, start, tuple(self.ids[start:end]), entering, start < self.prompt), lo, hi)

    def absorb(self, done: BlockPass, states: States) -> None:
        """Take in what a pass gave, or a lower part of it, or one over the first of its rows, now as deep as it went."""
        start, end = done.rows.start, done.rows.start + len(done.rows.ids)
        read = start < self.prompt and done.hi == self.backbone.spec.keeps_below  # and what keeps nothing may skip it
        self._forget(0 if read or done.hi == len(self.filled) else start)  # nothing has run behind these rows
        self._runs.append((start, end, states))
        self.filled[done.lo : done.hi] = [end] * (done.hi - done.lo)
        if read:
            self.filled[done.hi :] = [min(end, self.prompt - 1)] * (len(self.filled) - done.hi)
        self.row_blocks += (end - start) * (done.hi - done.lo)
        self.block_passes += done.hi - done.lo
        self.last = states
        if self.prefix_cache is not None and start < self.prompt and done.hi == len(self.filled):
            self._share(self.prefix_cache, end)

    def _share(self, prefix_cache: PrefixCache, end: int) -> None:
        """Let others begin with the first positions of the prompt, whole blocks of them until it has been read."""
        if end < self.prompt:
            prefix_cache.keep(self.cache, self.ids[: end - end % KV_BLOCK])
        elif self.last is not None:
            prefix_cache.keep(self.cache, self.ids[:end], self.last[-1:].copied())

    def advance(self, to: int, on_pass: Callable[[BlockPass, States], None] = lambda done, states: None) -> None:
        """Bring every position to depth ``to``: for each layer below it, the positions that layer has not seen. ``on_pass``
        sees each pass and its states."""
        while (ahead := self.next_pass(to)) is not None:
            (states,) = self.backbone.forward([ahead.rows], ahead.lo, ahead.hi, mlp=self.mlp)
            self.absorb(ahead, states)
            on_pass(ahead, states)

    def look(self, depth: int) -> Generator[BlockPass, Any, States]:
        """What a head reads at ``depth``, which all rows have reached: the states of the last rows, from the ``Spec.tail`` of
        this depth where it has one. Its passes are provisional; each is answered with a reply whose ``result`` is the pass, or
        a lower part of it, and its states."""
        assert self.last is not None
        states, tail = self.last, self.backbone.spec.tail(depth)
        for reached in range(tail[-1][1] - 1 if tail else 0, 0, -1):  # the rows of each depth, deepest first
            start, end = self.filled[reached], self.filled[reached - 1]
            if start == end:
                continue
            states = self.states(start, end)
            for lo, hi in tail:
                while (at := max(lo, reached)) < hi:
                    reply = yield BlockPass(
                        Rows(self.cache, start, tuple(self.ids[start:end]), states), at, hi, provisional=True
                    )
                    done, states = reply.result
                    lo = done.hi
                    self.row_blocks += (end - start) * (done.hi - done.lo)
                    self.block_passes += done.hi - done.lo
        return states

    def propagate(self) -> None:
        """Give the blocks that the newest positions have not run keys and values made from their states so far: they count as
        filled. An approximation, of engines that can (``Reflex.check`` refuses others)."""
        depth = next((layer for layer, filled in enumerate(self.filled) if filled < self.length), None)
        if depth is None:
            return
        start = self.filled[depth]
        assert self.filled[-1] == start, "one exit at a time"
        rows = Rows(self.cache, start, tuple(self.ids[start:]), self.states(start, self.length))
        self.backbone.propagate(rows, depth)
        self.filled = [self.length] * len(self.filled)
        del self._runs[:-1]

    def settle(self) -> None:
        """Count blocks that keep nothing of a position as run, once all that keep something have run: no later token reads
        what they would give. Not an approximation."""
        keeps = self.backbone.spec.keeps_below
        if keeps is not None and self.filled[keeps - 1] == self.length:
            self.filled = [self.length] * len(self.filled)
            del self._runs[:-1]

    def close(self) -> None:
        """Free KV memory; nothing can run afterwards."""
        self._runs.clear()
        self.last = None
        self.cache.close()

    def states(self, start: int, end: int) -> States:
        """The deepest states so far of positions [start, end).

        Those of the newest pass to full depth and of what came after it are kept: no block reads older ones again.
        """
        kept = range(self._runs[0][0], self._runs[-1][1]) if self._runs else range(0)
        assert kept.start <= start < end <= kept.stop, f"states are held of {kept}, not of [{start}, {end})"
        found = [states[max(start - lo, 0) : min(end, hi) - lo] for lo, hi, states in self._runs if lo < end and start < hi]
        return States.joined(found)

    def last_state(self, position: int) -> States:
        """The deepest state so far of a position among the newest."""
        lo, states = next((lo, states) for lo, _, states in reversed(self._runs) if lo <= position)
        return states[position - lo : position - lo + 1]

    def _forget(self, length: int) -> None:
        """Keep no states of positions from ``length`` on."""
        runs = self._runs
        while runs and runs[-1][0] >= length:
            runs.pop()
        if runs and runs[-1][1] > length:
            runs[-1] = (runs[-1][0], length, runs[-1][2])
