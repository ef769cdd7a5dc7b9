"""The training text: the model's own answers to prompts, kept in a file that a stopped run picks up again.

Exits learn to say early what *this* model says late, so the best text for them is the model's own (Kim & Rush 2016,
"Sequence-level knowledge distillation"; Medusa-2 and EAGLE train their drafters the same way). Half of the training
prompts are answered greedily and half sampled; held-out prompts are answered greedily, since what we report is agreement
with the full model's greedy token.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from adi.errors import AdiError
from adi.files import parse_json, write_text

HELD_OUT_SHARE = 0.08
WINDOW = 8  # batches that are sorted by length together, so that little is padded


@dataclass(frozen=True)
class Answer:
    """One sequence of token ids: ``ids[:start]`` is the prompt, the rest is what the model said (or the text itself)."""

    prompt: str
    ids: tuple[int, ...]
    start: int
    greedy: bool
    held_out: bool

    @property
    def tokens(self) -> int:
        return len(self.ids) - self.start


def _bucket(prompt: str, buckets: int) -> int:
    """A stable number in [0, buckets) for a prompt, so that the split never depends on order or on other prompts."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big") % buckets


def is_held_out(prompt: str | Sequence[int], share: float = HELD_OUT_SHARE) -> bool:
    """Whether texts with this prompt (text or token ids) are only tested on: by the prompt itself, so that a prompt that comes
    twice, in another run or at another precision, is always on one side."""
    text = prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
    return _bucket(text, 1000) < share * 1000


def is_greedy(prompt: str) -> bool:
    return is_held_out(prompt) or _bucket("greedy:" + prompt, 2) == 0


def read_answers(path: Path) -> list[Answer]:
    """The answers finished so far; a last line cut off by an interruption is dropped."""
    if not path.exists():
        return []
    answers = []
    for line in filter(None, path.read_bytes().split(b"\n")):
        try:
            row = parse_json(line)
            if not all(type(i) is int and i >= 0 for i in (row["start"], *row["ids"])) or not isinstance(row["prompt"], str):
                break
            answers.append(Answer(row["prompt"], tuple(row["ids"]), row["start"], row["greedy"], row["held_out"]))
        except (ValueError, KeyError, TypeError):
            break
    return answers


def interleave(groups: Sequence[Sequence[str]]) -> list[str]:
    """Round-robin over the prompt files, so that a token budget is shared by all of them; duplicates are dropped."""
    if any(isinstance(group, str) for group in groups):
        raise AdiError("prompts come in groups (one per file): give a list of lists of texts.")
    longest = max((len(group) for group in groups), default=0)
    mixed = (group[i] for i in range(longest) for group in groups if i < len(group))
    return list(dict.fromkeys(mixed))


def collect(
    model: Any,
    encode: Callable[[str], list[int]],
    eos_ids: Iterable[int],
    prompts: Sequence[str],
    path: Path,
    *,
    tokens: int,
    max_new_tokens: int = 160,
    batch: int = 48,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Let a transformers ``model`` answer ``prompts`` in batches until ``tokens`` answer tokens stand in ``path``.

    Every finished batch is appended to ``path`` at once; called again with the same arguments it goes on from there, and
    ends where an undisturbed run would have. Answers to other prompts may stand in the file; they are not returned.
    ``progress(done, total)`` is told the answer tokens so far.
    """
    answers = read_answers(path)
    write_text(path, "".join(_line(a) for a in answers))  # without the line that an interruption cut off
    known = {a.prompt: a for a in answers}
    generator = _fast_copy(model, path.with_suffix(".dtype"))
    chosen: list[Answer] = []
    done = 0
    for texts in _batches(prompts, encode, batch):
        if done >= tokens:
            break
        if any(text not in known for text in texts):
            fresh = _answer(generator, encode, frozenset(eos_ids), texts, max_new_tokens, seed)
            fresh = [a for a in fresh if a.prompt not in known]
            with path.open("a", encoding="utf-8") as file:
                file.writelines(_line(a) for a in fresh)
            known |= {a.prompt: a for a in fresh}
        chosen += [known[text] for text in texts]
        done = sum(a.tokens for a in chosen)
        progress(done, tokens)
    return chosen


def _line(answer: Answer) -> str:
    return json.dumps(asdict(answer), ensure_ascii=False) + "\n"


def _batches(prompts: Sequence[str], encode: Callable[[str], list[int]], batch: int) -> Iterable[list[str]]:
    """Batches of one kind (greedy or sampled) and of like lengths, in roughly the order given."""
    for at in range(0, len(prompts), batch * WINDOW):
        window = sorted(prompts[at : at + batch * WINDOW], key=lambda p: (is_greedy(p), len(encode(p))))
        for kind in (True, False):
            same = [p for p in window if is_greedy(p) is kind]
            yield from (same[i : i + batch] for i in range(0, len(same), batch))


def _answer(
    model: Any, encode: Callable[[str], list[int]], eos_ids: frozenset[int], texts: list[str], max_new_tokens: int, seed: int
) -> list[Answer]:
    greedy = is_greedy(texts[0])
    encoded = [encode(text) for text in texts]
    width = max(map(len, encoded))
    pad = min(eos_ids, default=0)
    ids = torch.tensor([[pad] * (width - len(e)) + e for e in encoded], device=model.device)
    mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded], device=model.device)
    choice: dict[str, Any] = (
        {"do_sample": False} if greedy else {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}
    )
    with torch.random.fork_rng(), torch.inference_mode():  # the caller's dice stay as they are
        torch.manual_seed(seed + _bucket(texts[0], 2**31))
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **choice)
    answers = []
    for text, prompt_ids, row in zip(texts, encoded, out[:, width:].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in eos_ids), len(row))
        answers.append(Answer(text, (*prompt_ids, *row[:end]), len(prompt_ids), greedy, is_held_out(text)))
    return answers


def _fast_copy(model: Any, note: Path) -> Any:
    """The model in bfloat16 where this machine multiplies faster in it (for text to train on, its rounding is harmless).

    The choice is noted in a file, so that a resumed run makes the same one.
    """
    if not quicker_in_bfloat16(note, lambda: model.dtype == torch.float32 and multiplies_faster_in_bfloat16(model.device)):
        return model
    with torch.random.fork_rng():
        fast = type(model)(model.config)
    fast.load_state_dict(model.state_dict())
    fast.generation_config = model.generation_config
    return fast.to(device=model.device, dtype=torch.bfloat16).eval()


def quicker_in_bfloat16(note: Path, faster: Callable[[], bool]) -> bool:
    """``faster()``, noted in a file, so that a run that goes on makes the same choice."""
    if not note.exists():
        write_text(note, "bfloat16" if faster() else "as it is")
    return note.read_text() == "bfloat16"


def multiplies_faster_in_bfloat16(device: torch.device) -> bool:
    slow, quick = (_matmul_seconds(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    return quick < 0.8 * slow


def _matmul_seconds(device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.ones(shape, device=device, dtype=dtype) for shape in ((64, 1024), (1024, 1024)))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        float((a @ b)[0, 0])
        times.append(time.perf_counter() - start)
    return sorted(times)[3]


def first_of(answers: Sequence[Answer], tokens: int) -> list[Answer]:
    """As many of the answers as hold so many tokens, from the first on."""
    before = accumulate((a.tokens for a in answers), initial=0)
    return [answer for answer, at in zip(answers, before, strict=False) if at < tokens]


def answers_hash(answers: Sequence[Answer]) -> str:
    return hashlib.blake2b(repr([a.ids for a in answers]).encode(), digest_size=8).hexdigest()
