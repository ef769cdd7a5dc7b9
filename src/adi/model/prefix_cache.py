"""KV memory of texts that were read before: another text starts where it first differs from all of them.

Blocks of ``KV_BLOCK`` tokens, each found by what precedes it: a tree, whose nodes are looked up by their tokens (Kwon et al.
2023, Zheng et al. 2024). Kept are positions of prompts only, whose keys and values depend on the tokens alone. Those of an
answer are computed by another kernel, token by token; they are kept once it has been read as part of a longer prompt.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from adi.arguments import instance, whole
from adi.errors import MemoryFullError, UsageError
from adi.model.backbone import KV_BLOCK, Backbone, KVCache, States

BUDGET = 1 << 30
ENDING = -1  # no token: before those of a prompt's last part, where that would be computed otherwise in a longer prompt


@dataclass(eq=False)
class _Node:
    """Tokens of a block, or of a leaf fewer. ``last`` has deepest states, by how many of these tokens lead to them."""

    ids: tuple[int, ...]
    above: _Node | None
    part: KVCache | None
    below: dict[tuple[int, ...], _Node] = field(default_factory=dict)
    last: dict[int, States] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        return self.part is not None and not self.part.shared


class PrefixCache:
    """What was computed of prompts, for others that begin alike: the next turns of a chat, a system prompt, few-shot examples.
    A context manager that frees it.

        with adi.PrefixCache(model) as kept:
            adi.generate(model, messages, prefix_cache=kept)

    What is taken from it is bit for bit what reading the prompt anew gives. Where there is more than ``budget_bytes`` (1 GiB),
    or where the engine's KV memory is wanted otherwise, what was used least lately goes first. On engine "hf" a model with
    other weights than before is noticed, unless they were changed behind torch's back (``tensor.data``): ``clear`` it then.
    """

    def __init__(self, model: Any, budget_bytes: int = BUDGET, *, answers: bool = True) -> None:
        """``model``: from ``adi.load``, or its backbone. ``answers``: read them again when they have come to their end, once
        nothing else is to be done, so that the next turn of a chat begins behind them."""
        self.backbone: Backbone = getattr(model, "backbone", model)
        self.budget_bytes = whole("budget_bytes", budget_bytes, 0)
        self.answers = answers
        self.bytes = 0
        self._root = _Node((), None, None)
        self._nodes = OrderedDict[_Node, None]()  # least lately used first, so that what follows a node comes before it
        self._lock = threading.RLock()
        self.backbone.add_keeper(self)

    @property
    def tokens(self) -> int:
        """Of so many positions there is something."""
        return sum(len(node.ids) for node in list(self._nodes))

    def match(self, ids: Sequence[int]) -> int:
        """How many tokens of this text are known."""
        with self._lock:
            return sum(count for _, count in self._path(tuple(ids)))

    def begin(self, cache: KVCache, ids: Sequence[int], states: bool = True) -> tuple[int, States | None]:
        """Let the empty KV memory of a text hold what is known of it: how many positions and, where these are all, which they
        are only with ``states``, the deepest state of the last one."""
        with self._lock:
            ids = tuple(ids)
            path = self._path(ids)
            self._touch([node for node, _ in path])
            known, last = sum(count for _, count in path), None
            if states and path and known == len(ids):
                last = path[-1][0].last.get(path[-1][1])
            elif states and (rest := self._rest(path, ids, known)) is not None:
                path, last = rest, rest[-1][0].last.get(rest[-1][1])
            length = len(ids) if last is not None else self.backbone.spec.prompt_start(known, len(ids))
            if not length:
                return 0, None
            parts = [node.part for node, _ in (path if last is not None else path[: -(-length // KV_BLOCK)])]
            try:
                held = self.backbone.resume(cache, parts, length)
            except MemoryFullError:  # no room for the copy of a block: it reads all itself, or waits
                return 0, None
            if not held:
                self.clear()
            return (length, last) if held else (0, None)

    def keep(self, cache: KVCache, ids: Sequence[int], last: States | None = None) -> None:
        """Keep what these first tokens of a text have left in its KV memory; with ``last``, the deepest state of the last of
        them, they are a whole prompt."""
        with self._lock:
            ids, node, path = tuple(ids), self._root, list[_Node]()
            whole = self.backbone.spec.whole(len(ids))
            places = [(start, ids[start : min(start + KV_BLOCK, whole)]) for start in range(0, whole, KV_BLOCK)]
            places += [(whole, (ENDING, *ids[whole:]))] if last is not None and whole < len(ids) else []
            for start, block in places:
                below = self._below(node, block, cache, start)
                if below is None:
                    break
                path.append(node := below)
            else:
                if last is not None:
                    node.last[len(places[-1][1])] = last
            self._touch(path)
            while self.bytes > self.budget_bytes and self._nodes:
                self._drop(next(iter(self._nodes)))

    def _below(self, node: _Node, block: tuple[int, ...], cache: KVCache, start: int) -> _Node | None:
        """The node of this block, made where there is none yet."""
        if (known := node.below.get(block)) is not None:
            return known
        if len(block) < KV_BLOCK and block[0] != ENDING and (longer := next((n for n in _like(node, block)), None)) is not None:
            return longer
        part = self.backbone.part(cache, start, start + len(block) - (block[0] == ENDING))
        if part is None:
            return None
        made = _Node(block, node, part)
        for shorter in [n for n in node.below.values() if n.ids == block[: len(n.ids)]]:
            made.last.update(shorter.last)
            self._drop(shorter)
        node.below[block] = made
        self._nodes[made] = None
        self.bytes += part.bytes
        return made

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            for node in self._nodes:  # which refer to each other, so that nobody else would soon free what they have
                if node.part is not None:
                    node.part.close()
            self._root.below.clear()
            self._nodes.clear()
            self.bytes = 0

    close = clear

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def idle(self) -> int:
        """How many blocks would be free if they were wanted."""
        blocked, count = set[_Node | None](), 0
        for node in list(self._nodes):
            if node in blocked or not node.idle:
                blocked.add(node.above)
            else:
                count += 1
        return count

    def evict(self) -> bool:
        """Forget one block, of those that no text under way uses the one used least lately; False where there is none."""
        if not self._lock.acquire(blocking=False):  # whoever has it may wait for the engine, which waits for this
            return False
        try:
            node = next((node for node in self._nodes if not node.below and node.idle), None)
            if node is not None:
                self._drop(node)
            return node is not None
        finally:
            self._lock.release()

    def _path(self, ids: tuple[int, ...]) -> list[tuple[_Node, int]]:
        """The nodes that this text goes through, and how many tokens of each."""
        path, node, start = list[tuple[_Node, int]](), self._root, 0
        while start < len(ids) and node.below:
            block = ids[start : start + KV_BLOCK]
            found = node.below.get(block) or max(node.below.values(), key=lambda below: alike(below.ids, block))
            if not (count := alike(found.ids, block)):
                break
            path.append((found, count))
            node, start = found, start + count
            if count < KV_BLOCK:
                break
        return path

    def _rest(self, path: list[tuple[_Node, int]], ids: tuple[int, ...], known: int) -> list[tuple[_Node, int]] | None:
        """The path of a prompt that was read before, to its end, though the last of it is no beginning of others."""
        whole = self.backbone.spec.whole(len(ids))
        path = path[: whole // KV_BLOCK]
        ending = (ENDING, *ids[whole:])
        node = (path[-1][0] if path else self._root).below.get(ending) if known >= whole else None
        return None if node is None else [*path, (node, len(ending))]

    def _touch(self, path: Sequence[_Node]) -> None:
        for node in reversed(path):
            if node in self._nodes:  # and was not dropped since
                self._nodes.move_to_end(node)

    def _drop(self, node: _Node) -> None:
        assert node.above is not None
        assert node.part is not None
        del node.above.below[node.ids], self._nodes[node]
        self.bytes -= node.part.bytes
        node.part.close()


def _like(node: _Node, block: tuple[int, ...]) -> Iterator[_Node]:
    return (below for below in node.below.values() if below.ids[: len(block)] == block)


def checked(prefix_cache: PrefixCache | None, model: Any) -> PrefixCache | None:
    """The one given; UsageError for another model's, and for what is none."""
    if prefix_cache is None:
        return None
    instance("prefix_cache", prefix_cache, PrefixCache, "adi.PrefixCache(model)")
    if prefix_cache.backbone is not model.backbone:
        raise UsageError(
            f"prefix_cache was made of another model than {model.backbone.spec.name}, of {prefix_cache.backbone.spec.name}; "
            "make one of this model by adi.PrefixCache(model)."
        )
    return prefix_cache


def alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common before they differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
