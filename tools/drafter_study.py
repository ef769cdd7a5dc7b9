"""Kinds of drafters on the same text and budget: agreement of the first draft with the full model's greedy token.

``python tools/drafter_study.py SHARDS docs/results/drafters.json [POSITIONS [PASSES]]``: SHARDS is a folder of talk (``adi tune
--talk`` leaves one in its work folder). Every kind sees each position once, one step ahead, in the same order, and is judged on
the model's own greedy answers to bench prompts. The network is that of ``adi.exits.drafter``, one gated MLP that begins as the
model's own last one, with other inputs; *jump* runs trained copies of the last blocks on the shallow state, over the exact keys
and values of the positions before it. Kinds that are in the file already are not trained again. With PASSES above one: so many
passes over the text, and only the kinds that differ in the deep state they read.
"""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import adi
from adi.exits.heads import Shortlist, shortlist
from adi.files import read_json, write_json
from adi.measure.circumstances import circumstances
from adi.model.arrays import normalise
from adi.prompts import read_prompts, spread
from adi.training.fit import schedule
from adi.training.tracks import read_tracks

LAYERS = 30
SHALLOW, DEEP = (0, 2, 4, 8), (12, 16, 20, 24, 28, 29, LAYERS)  # states kept; the last one is normed, as drafters read it
BENCH, ANSWER = 40, 96
PROMPT_WEIGHT, RATE, JUMP_RATE = 0.3, 1e-3, 5e-4
UPDATE = 192  # positions


@dataclass(frozen=True)
class Kind:
    """A drafter reads the newest token's state at depth ``shallow`` and those at ``deep`` of the position before it; copies of
    the last ``jump`` blocks stand in for its MLP."""

    name: str
    shallow: int = 0
    deep: tuple[int, ...] = (LAYERS,)
    shortlist: int = 4096
    jump: int = 0


KINDS = (
    Kind("as shipped: depth 0, last state, shortlist 4096"),
    Kind("jump from depth 0 into the last block", 0, (), jump=1),
    Kind("depth 4", shallow=4),
    Kind("jump from depth 4 into the last two blocks", 4, (), jump=2),
    Kind("shortlist 2048", shortlist=2048),
    Kind("shortlist 16384", shortlist=16384),
    Kind("states at depths 20 and 30", deep=(20, LAYERS)),
    Kind("jump from depth 0 into the last block, last state beside it", jump=1),
    Kind("state at depth 20", deep=(20,)),
    Kind("depth 8", shallow=8),
    Kind("depth 2", shallow=2),
    Kind("jump from depth 0 into the last two blocks", 0, (), jump=2),
    Kind("jump from depth 4 into the last block", 4, (), jump=1),
    Kind("shortlist 8192", shortlist=8192),
)
STATES = (  # once more for which deep state to feed, with more passes over the same text
    Kind("state at depth 30 (as shipped)"),
    Kind("state at depth 20", deep=(20,)),
    Kind("state at depth 16", deep=(16,)),
    Kind("state at depth 24", deep=(24,)),
    Kind("states at depths 20 and 30", deep=(20, LAYERS)),
    Kind("state at depth 12", deep=(12,)),
)


@dataclass(frozen=True)
class Text:
    """Token ids ``[T]``, states ``[T, D]`` by depth in half precision, the logits' total ``[T]``, the greedy token ``[T]``, and
    whether the model says an answer token next ``[T]``."""

    ids_T: Tensor
    at: dict[int, Tensor]
    total_T: Tensor
    greedy_T: Tensor
    answer_T: Tensor


@torch.no_grad()
def read(hf: Any, ids_T: Tensor, answer_T: Tensor) -> Text:
    """One pass of the full model in float32."""
    out = hf.model(ids_T[None], output_hidden_states=True)
    logits_TV = hf.lm_head(out.last_hidden_state[0])
    at = {d: out.hidden_states[d][0].half() for d in (*SHALLOW, *DEEP[:-1])} | {LAYERS: out.last_hidden_state[0].half()}
    return Text(ids_T, at, logits_TV.logsumexp(-1), logits_TV.argmax(-1), answer_T)


class Net(nn.Module):
    """One kind of drafter."""

    def __init__(self, kind: Kind, hf: Any, among: Shortlist) -> None:
        super().__init__()
        width, blocks, last = hf.config.hidden_size, hf.model.layers, hf.model.layers[-1]
        self.kind, self.rotary, self.eps = kind, hf.model.rotary_emb, hf.config.rms_norm_eps
        parts = 1 + len(kind.deep)
        eye = torch.eye(width) / parts
        self.shallow = nn.Parameter(torch.ones(width))
        noise = 0.1 * torch.randn(width, parts * width) / (parts * width) ** 0.5
        self.mix = nn.Parameter(torch.cat([eye] * parts, 1) + noise)
        self.mlp = copy.deepcopy(last.mlp) if not kind.jump else None
        self.norm = nn.Parameter(last.post_attention_layernorm.weight.detach().clone())
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in blocks[LAYERS - kind.jump :])
        self.out = nn.Parameter(hf.model.norm.weight.detach().clone())
        self.tail, self.tail_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(1))
        self.requires_grad_(True)  # what was copied as well
        self.weight_SD = among.weight_SD.detach()
        if self.mlp is not None:
            with torch.no_grad():
                self.mlp.down_proj.weight *= 0.2

    def forward(self, text: Text) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the shortlist ``[T - 1, S]`` and the tail ``[T - 1]`` after each token but the first."""
        shallow = text.at[self.kind.shallow][1:].float()
        if self.kind.jump and not self.kind.deep:
            x_TD = linear(shallow if self.kind.shallow else normalise(shallow, "rms", self.eps) * self.shallow, self.mix)
        else:
            before = [text.at[d][:-1].float() for d in self.kind.deep]
            before = [b if d == LAYERS else normalise(b, "rms", self.eps) for d, b in zip(self.kind.deep, before, strict=True)]
            x_TD = linear(torch.cat([normalise(shallow, "rms", self.eps) * self.shallow, *before], -1), self.mix)
        if self.mlp is not None:
            x_TD = x_TD + self.mlp(normalise(x_TD, "rms", self.eps) * self.norm)
        for i, block in enumerate(self.blocks):
            x_TD = self._block(block, x_TD, text.at[LAYERS - len(self.blocks) + i].float())
        state_TD = normalise(x_TD, "rms", self.eps) * self.out
        logits_TS, tail_T = linear(state_TD, self.weight_SD), state_TD @ self.tail + self.tail_bias
        total_T = torch.logaddexp(logits_TS.logsumexp(-1), tail_T)
        return logits_TS - total_T[:, None], tail_T - total_T

    def _block(self, block: Any, x_TD: Tensor, true_TD: Tensor) -> Tensor:
        """A block at positions 1 to T - 1, each over the true states before it and its own."""
        attention, count = block.self_attn, len(x_TD)
        size = attention.head_dim
        place = torch.arange(len(true_TD))[None]
        cos, sin = self.rotary(x_TD[None], place)
        mine, true = block.input_layernorm(x_TD), block.input_layernorm(true_TD)

        def heads(y: Tensor) -> Tensor:
            return y.view(len(y), -1, size).transpose(0, 1)

        def turned(y: Tensor, at: slice) -> Tensor:
            half = torch.cat([-y[..., size // 2 :], y[..., : size // 2]], -1)
            return y * cos[0, at] + half * sin[0, at]

        q, own = (turned(heads(f(mine)), slice(1, None)) for f in (attention.q_proj, attention.k_proj))
        keys, values = turned(heads(attention.k_proj(true)), slice(None)), heads(attention.v_proj(true))
        groups = q.shape[0] // keys.shape[0]
        own, keys, values, own_values = (
            y.repeat_interleave(groups, 0) for y in (own, keys, values, heads(attention.v_proj(mine)))
        )
        scores = q @ keys.transpose(1, 2) * attention.scaling
        hidden = torch.arange(len(true_TD))[None] >= torch.arange(1, count + 1)[:, None]  # a position's true state is not known
        scores = torch.cat([scores.masked_fill(hidden, -torch.inf), (q * own).sum(-1, keepdim=True) * attention.scaling], -1)
        p = scores.softmax(-1)
        mixed = p[..., :-1] @ values + p[..., -1:] * own_values
        x_TD = x_TD + attention.o_proj(mixed.transpose(0, 1).reshape(count, -1))
        return x_TD + block.mlp(block.post_attention_layernorm(x_TD))


def loss(net: Net, text: Text, among: Shortlist) -> Tensor:
    """Cross entropy with the full model's distribution over shortlist and tail, the sum over positions."""
    log_TS, tail_T = net(text)
    logits_TS = linear(text.at[LAYERS][1:].float(), among.weight_SD)
    inside_TS = (logits_TS - text.total_T[1:, None]).exp()
    rest_T = (1 - inside_TS.sum(-1)).clamp(min=1e-6)
    entropy_T = -(inside_TS * log_TS).sum(-1) - rest_T * tail_T
    return (entropy_T * torch.where(text.answer_T[1:], 1.0, PROMPT_WEIGHT)).sum()


@torch.no_grad()
def right(net: Net, texts: Sequence[Text], among: Shortlist) -> float:
    """The share of answer positions at which the likeliest token is the full model's."""
    hits, asked = 0, 0
    for text in texts:
        said_T = among.ids_S[net(text)[0].argmax(-1)]
        live_T = text.answer_T[1:]
        hits += int((said_T == text.greedy_T[1:])[live_T].sum())
        asked += int(live_T.sum())
    return hits / asked


def train(kind: Kind, hf: Any, among: Shortlist, texts: Sequence[Text]) -> Net:
    """One pass over all texts, whole texts in an update until it has enough positions."""
    torch.manual_seed(0)
    net = Net(kind, hf, among)
    rate = JUMP_RATE if kind.jump else RATE
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    total, done, held = sum(len(text.ids_T) for text in texts), 0, 0
    for text in texts:
        (loss(net, text, among) / UPDATE).backward()
        done, held = done + len(text.ids_T), held + len(text.ids_T)
        if held >= UPDATE:
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(done / total)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            held = 0
    return net


def texts_of(hf: Any, folder: Path, positions: int) -> list[Text]:
    """So many positions of talk, read by the full model."""
    found: list[Text] = []
    for path in sorted(folder.glob("talk-*.safetensors")):
        tracks = read_tracks(path)
        counts = tracks.sequence_N.unique_consecutive(return_counts=True)[1].tolist()
        for ids_T, answer_T in zip(tracks.ids_N.split(counts), tracks.answer_N.split(counts), strict=True):
            if sum(len(text.ids_T) for text in found) < positions:
                found.append(read(hf, ids_T.long(), answer_T))
        print(path.name, len(found), flush=True)
    random.Random(0).shuffle(found)
    return found


def main(folder: Path, out: Path, positions: int, passes: int) -> None:
    torch.set_num_threads(2)
    model = adi.load("smollm2-135m", backend="hf")
    hf: Any = model.backbone.model  # type: ignore[attr-defined]
    hf.requires_grad_(False)
    talk = texts_of(hf, folder, positions)
    items = spread(read_prompts("bench"), BENCH)
    answers = adi.generate_batch(adi.load("smollm2-135m", precision="int8"), [i.prompt for i in items], max_new_tokens=ANSWER)
    bench = []
    for g in answers:
        ids_T = torch.tensor([*g.prompt_ids, *g.token_ids])
        bench.append(read(hf, ids_T, torch.arange(len(ids_T)) >= len(g.prompt_ids) - 1))
    counts = torch.bincount(torch.cat([t.ids_T[t.answer_T] for t in talk]), minlength=hf.config.vocab_size)
    often = counts.argsort(descending=True, stable=True)
    about = circumstances(f"python tools/drafter_study.py {folder.name} {out} {positions} {passes}", items)
    rows: list[dict[str, Any]] = read_json(out, "study")["kinds"] if out.exists() else []
    readout = model.backbone.readout().tensors()
    for kind in KINDS if passes == 1 else STATES:
        if any(row["name"] == kind.name for row in rows):
            continue
        among = shortlist(readout, often[: kind.shortlist].sort().values)
        begun = time.perf_counter()
        net = train(kind, hf, among, talk * passes)
        known = torch.isin(torch.cat([t.greedy_T[t.answer_T] for t in bench]), among.ids_S).float().mean()
        rows.append(
            {
                **asdict(kind),
                "right": right(net, bench, among),
                "coverage": float(known),
                "seconds": time.perf_counter() - begun,
            }
        )
        print(rows[-1], flush=True)
        write_json(
            out, {"format": "adi-drafters", "version": 1, **about, "positions": positions, "passes": passes, "kinds": rows}
        )


if __name__ == "__main__":
    numbers = [int(given) for given in sys.argv[3:]]
    main(Path(sys.argv[1]), Path(sys.argv[2]), *(numbers + [150_000, 1][len(numbers) :]))
