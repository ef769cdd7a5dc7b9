"""Training text that costs one pass: the model writes its own prompts and answers, and what drafters learn from is kept.

Many texts run side by side. Each begins with a prompt of the caller's, or with nothing but the chat template up to where a
user speaks: an instruction-tuned model then writes the user's turn too, from the distribution it was tuned on (Magpie, Xu
et al. 2024). A model without a template begins with what its tokenizer puts before any text, writes some words and goes on
with them. Its last states, the logarithm of the logits' total and its greedy token are noted as the text grows, so no
pass over the finished text is needed. Finished texts are written in shards; a stopped run goes on behind the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adi.errors import AdiError
from adi.files import write_text
from adi.model.backbone import Backbone, Rows, TopK
from adi.model.load import Model
from adi.training.answers import HELD_OUT_SHARE, is_held_out
from adi.training.drafter_shards import HEAD_ROWS, SHARD_SEQUENCES, DrafterShard, write_shard
from adi.training.shards import in_halves

SIDE_BY_SIDE = 64
LIKELIEST = 48  # a token is drawn from so many
OWN_PROMPTS = 0.75  # share of texts whose prompt the model writes too
OWN_WORDS = 0.5  # the same for a model without a chat template, which writes anything but prompts
GREEDY = 0.6  # share of answers that are greedy, as what they are for mostly is
WARMTH = 0.8  # of the other answers
LONGEST_PROMPT = 160
FIRST_WORDS = 24  # tokens of its own that a model without a chat template goes on with
MARK = "\u2063user\u2063"


@dataclass(frozen=True)
class Template:
    """Token ids of a conversation's fixed parts: before the user's words, and between them and the answer (nothing, where
    there is no chat template); ``longest`` words of the user's are written."""

    opening: tuple[int, ...]
    between: tuple[int, ...]
    longest: int

    @classmethod
    def of(cls, model: Model) -> Template:
        """From the model's chat template, or without one from how its texts begin; ValueError where nothing does, and where a
        template bends what a user says."""
        if model.tokenizer is None or not (model.tokenizer.has_chat_template or model.tokenizer.encode("")):
            raise AdiError(
                "this model has no chat template and no token that begins a text, so it cannot write prompts; give some with "
                "prompts=... and own_prompts=0."
            )
        if not model.tokenizer.has_chat_template:
            return cls(model.tokenizer.encode(""), (), FIRST_WORDS)
        messages = [{"role": "user", "content": MARK}]
        text = model.tokenizer.hf.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        before, mark, after = text.partition(MARK)
        if not mark:
            raise AdiError("this model's chat template changes what a user says, so it cannot write prompts.")
        opening, between = (tuple(model.tokenizer.hf(part, add_special_tokens=False)["input_ids"]) for part in (before, after))
        return cls(opening, between, LONGEST_PROMPT)


@dataclass(frozen=True)
class GenerateOptions:
    """``tokens`` of answers in all, at most ``max_new_tokens`` each, ``side_by_side`` texts at once; ``held_share`` of
    the prompts are only tested on (1: all)."""

    tokens: int
    max_new_tokens: int = 200
    side_by_side: int = SIDE_BY_SIDE
    own_prompts: float = OWN_PROMPTS
    seed: int = 0
    held_share: float = HELD_OUT_SHARE


@dataclass
class _Text:
    """One text under way. ``start`` is where its answer begins, None while the model writes the prompt."""

    cache: Any
    ids: list[int]
    start: int | None
    greedy: bool
    longest_prompt: int = 0
    known: int = 0
    deep: list[Tensor] = field(default_factory=list)
    total: list[Tensor] = field(default_factory=list)
    token: list[Tensor] = field(default_factory=list)

    def note(self, deep_TD: Tensor, total_T: Tensor, token_T: Tensor) -> None:
        self.known += deep_TD.shape[0]
        self.deep.append(in_halves(deep_TD))
        self.total.append(total_T)
        self.token.append(token_T)

    def tracks(self, number: int) -> DrafterShard:
        count = self.known
        return DrafterShard(
            ids_N=torch.tensor(self.ids[:count], dtype=torch.int32),
            deep_ND=torch.cat(self.deep),
            total_N=torch.cat(self.total).float(),
            token_N=torch.cat(self.token).int(),
            sequence_N=torch.full((count,), number, dtype=torch.int32),
            answer_N=torch.arange(count) >= (self.start or count) - 1,
        )


class _Talk:
    """All texts under way, and the dice."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], options: GenerateOptions, begun: int) -> None:
        self.backbone: Backbone = model.backbone
        if not prompts and options.own_prompts <= 0:
            raise AdiError("own_prompts is 0 and there are no prompts: give some, or let the model write its own.")
        self.ends, self.options, self.prompts = model.eos_ids, options, prompts
        self.template = Template.of(model) if options.own_prompts > 0 else None
        self.dice = np.random.default_rng([options.seed, begun])
        self.running: list[_Text] = []
        self.unasked: list[int] = []

    def begin(self) -> _Text:
        own = self.template is not None and (not self.prompts or self.dice.random() < self.options.own_prompts)
        greedy = bool(self.dice.random() < GREEDY)
        if own:
            assert self.template is not None
            ids = list(self.template.opening)
            return _Text(self.backbone.new_cache(), ids, None, greedy, len(ids) + self.template.longest)
        if not self.unasked:  # all of them once before any again: greedy answers would only be the same
            self.unasked = self.dice.permutation(len(self.prompts)).tolist()
        ids = list(self.prompts[self.unasked.pop()])
        return _Text(self.backbone.new_cache(), ids, len(ids), greedy)

    def step(self) -> list[_Text]:
        """One pass for all of them; the texts that it finished."""
        while len(self.running) < self.options.side_by_side:
            self.running.append(self.begin())
        rows = [Rows(t.cache, t.known, tuple(t.ids[t.known :]), None) for t in self.running]
        states = self.backbone.forward(rows, 0, self.backbone.spec.layers)
        top_k_tokens = _outlook(self.backbone, torch.cat([s.hidden_TD for s in states]))
        done, at = [], 0
        for text, state in zip(list(self.running), states, strict=True):
            upto = at + state.hidden_TD.shape[0]
            text.note(state.hidden_TD, top_k_tokens.total_T[at:upto], top_k_tokens.ids_TK[at:upto, 0])
            self._say(text, top_k_tokens.logits_TK[upto - 1].numpy(), top_k_tokens.ids_TK[upto - 1].numpy())
            at = upto
            if self._over(text):
                done.append(text)
                self.running.remove(text)
                text.cache.close()
        return done

    def _say(self, text: _Text, logits_K: Any, ids_K: Any) -> None:
        token = int(ids_K[0])
        if text.start is None or not text.greedy:
            warmth = 1.0 if text.start is None else WARMTH
            weights = np.exp((logits_K - logits_K[0]) / warmth)
            token = int(ids_K[self.dice.choice(len(weights), p=weights / weights.sum())])
        if text.start is not None:
            text.ids.append(token)
            return
        assert self.template is not None
        ended = token in self.ends or len(text.ids) >= text.longest_prompt
        if not self.template.between:  # the answer goes on with the first words, which end nothing
            text.ids.append(next(i for i in (token, *ids_K.tolist()) if i not in self.ends))
        else:
            text.ids.extend(self.template.between if ended else (token,))
        if ended:
            text.start = len(text.ids)

    def _over(self, text: _Text) -> bool:
        if text.start is None or text.known < text.start:
            return False
        said = len(text.ids) - text.start
        return said >= self.options.max_new_tokens or text.ids[-1] in self.ends


def _outlook(backbone: Backbone, hidden_TD: Tensor) -> TopK:
    """A few rows at a time: of a large vocabulary the logits of all prompts at once would fill the memory."""
    parts = [backbone.top_k_tokens(rows_TD, LIKELIEST) for rows_TD in hidden_TD.split(HEAD_ROWS)]
    return TopK(*(torch.cat([getattr(part, name) for part in parts]) for name in TopK.__dataclass_fields__))


def share_of_own(model: Model) -> float:
    """The share of texts that this model had better begin itself; 0 where it cannot."""
    if model.tokenizer is None or model.tokenizer.has_chat_template:
        return OWN_PROMPTS
    return OWN_WORDS if model.tokenizer.encode("") else 0.0


def talk(
    model: Model,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    options: GenerateOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Path], list[Path]]:
    """Write shards into ``folder`` until their answers hold ``options.tokens`` tokens; those to train on and those held out,
    oldest first.

    ``prompts`` are token ids up to where an answer begins; which side a text is on follows from its prompt alone. The engine
    should be the one that drafts are for: its states are what a drafter reads. A shard's dice depend on the seed and on its
    number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = _finished(folder)
    tokens = tokens_in([path for paths in done for path in paths])
    talking = _Talk(model, prompts, options, len(done))
    ready: list[_Text] = []
    progress(tokens, options.tokens)
    while tokens < options.tokens:
        ready += talking.step()
        progress(tokens + sum(map(_said, ready)), options.tokens)
        if len(ready) < SHARD_SEQUENCES:
            continue
        done.append(_write(folder, len(done), ready, options.held_share))
        tokens, ready = tokens + tokens_in(done[-1]), []
    for text in talking.running:
        text.cache.close()
    paths = [path for group in done for path in group]
    return [p for p in paths if p.name.startswith("train")], [p for p in paths if p.name.startswith("held")]


def _said(text: _Text) -> int:
    """Tokens of its answer."""
    return text.known + 1 - (text.start or text.known)


def _write(folder: Path, number: int, texts: Sequence[_Text], held_share: float) -> list[Path]:
    """The shards of one group of texts, training and held out; the mark that it is whole comes last."""
    sides: dict[str, list[_Text]] = {"train": [], "held": []}
    for text in texts:
        sides["held" if is_held_out(text.ids[: text.start], held_share) else "train"].append(text)
    paths = []
    for side, mine in sides.items():
        if mine:
            paths.append(folder / f"{side}-{number:05d}-{sum(map(_said, mine))}.safetensors")
            write_shard(paths[-1], [text.tracks(i) for i, text in enumerate(mine)])
    write_text(folder / f"group-{number:05d}", "\n".join(path.name for path in paths))
    return paths


def _finished(folder: Path) -> list[list[Path]]:
    """The shards of every group of texts that is whole."""
    return [[folder / name for name in mark.read_text().split()] for mark in sorted(folder.glob("group-*"))]


def tokens_in(paths: Sequence[Path]) -> int:
    """Answer tokens in these shards, as their names say."""
    return sum(int(path.stem.rsplit("-", 1)[1]) for path in paths)
