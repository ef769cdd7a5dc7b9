"""Reflex mode in use, for docs/reflex.md: speed, checkable tasks, and text far from the calibration prompts.

Stages of ``tools/reflex.py`` that need exits with certificates.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import mean, median
from typing import Any

import adi
from adi.measure.risk import disagreement
from adi.measure.statistics import bootstrap_median
from adi.measure.timing import timed
from adi.measure.told import tell

Guard = Callable[[], AbstractContextManager[object]]
TASKS = Path(__file__).parent / "data" / "tasks.jsonl"
FAR_TOKENS, FAR_PROMPTS = 48, 60
WATCHED = ((0.02, 0.05), (0.02, 0.5), (0.1, 0.05), (0.1, 0.5))  # levels, and shares of tokens that are checked
FRENCH_TOPICS = (
    *("les volcans", "la cuisine", "les abeilles", "la lune", "le pain", "la mer", "les trains", "le sommeil", "la musique"),
    *("les chats", "la neige", "les livres", "le football", "les rivières", "la forêt"),
)
FRENCH_TASKS = (
    "Écris une petite histoire sur {t}.",
    "Explique {t} à un enfant de dix ans.",
    "Que faut-il savoir sur {t} ? Réponds en français.",
    "Donne cinq faits intéressants sur {t}.",
)
CODE = ("json.decoder", "heapq", "textwrap", "csv", "bisect", "shlex", "string", "fractions", "statistics", "calendar")


def speeds(model: adi.Model, exits: adi.Exits, levels: list[float], prompts: list[str], tokens: int) -> list[dict[str, Any]]:
    """Each level, verified and full depth on the same prompts, in turn: median tokens per second, and the ratio to full."""
    policies: dict[str, adi.Policy] = {"full": adi.FullDepth(), "verified": adi.Verified(exits)}
    policies |= {f"{level:g}": adi.Reflex(exits, risk=level) for level in levels}
    for policy in policies.values():
        timed(model, policy, model.encode(prompts[0]), 8)
    model.backbone.prepare((), drafts=True, wait=True)
    found: dict[str, list[float]] = {name: [] for name in policies}
    for prompt in prompts:
        for name, policy in policies.items():
            found[name].append(timed(model, policy, model.encode(prompt), tokens).tokens_per_second)
    rows = []
    for name, values in found.items():
        ratios = [a / b for a, b in zip(values, found["full"], strict=True)]
        interval = bootstrap_median(ratios)
        rows.append(
            {
                "name": name,
                "tokens_per_second": median(values),
                "ratio": interval.median,
                "low": interval.low,
                "high": interval.high,
            }
        )
    return rows


def tasks(model: adi.Model, exits: adi.Exits, levels: list[float]) -> dict[str, Any]:
    """Of the tasks that full depth does, the share done at each level."""
    asked = [json.loads(line) for line in TASKS.read_text(encoding="utf-8").splitlines()]
    prompts = [task["prompt"] for task in asked]

    def done(policy: adi.Policy, which: list[int]) -> list[int]:
        texts = adi.generate_batch(model, [prompts[i] for i in which], policy, max_new_tokens=64)
        return [i for i, text in zip(which, texts, strict=True) if re.search(asked[i]["pattern"], text.text)]

    able = done(adi.FullDepth(), list(range(len(asked))))
    rows = [{"level": level, "passed": len(done(adi.Reflex(exits, risk=level), able))} for level in levels]
    return {"asked": len(asked), "full": len(able), "levels": rows}


def far(model: adi.Model) -> dict[str, list[Any]]:
    """Prompts far from the calibration set, as token ids: another language, source code and random bytes, the last two raw."""
    dice = random.Random(0)
    french = [task.format(t=topic) for topic in FRENCH_TOPICS for task in FRENCH_TASKS]
    dice.shuffle(french)
    sources = "\n".join(inspect.getsource(importlib.import_module(name)) for name in CODE)
    starts = [dice.randrange(len(sources) - 400) for _ in range(FAR_PROMPTS)]
    noise = [bytes(dice.randrange(256) for _ in range(80)).decode("latin-1") for _ in range(FAR_PROMPTS)]
    return {
        "French": [model.encode(p) for p in french[:FAR_PROMPTS]],
        "Python source": [model.encode(sources[at : at + 400], raw=True) for at in starts],
        "random bytes": [model.encode(p, raw=True) for p in noise],
    }


def drift(model: adi.Model, exits: adi.Exits, near: list[str], guard: Guard) -> list[dict[str, Any]]:
    """For each level, share and kind of text: the true risk of its reflex texts, and what a monitor makes of them in turn."""
    kinds = {"calibration's kind": [model.encode(p) for p in near[:FAR_PROMPTS]], **far(model)}
    rows, truths = [], dict[tuple[float, str], dict[str, float]]()
    for level, spot_check in WATCHED:
        for name, prompts in kinds.items():
            with guard():
                if (level, name) not in truths:
                    truths[level, name] = _truth(model, adi.Reflex(exits, risk=level), prompts)
                policy = adi.Reflex(exits, risk=level, spot_check=spot_check)
                tokens, fell = _watched(model, policy, prompts)
            assert policy.monitor is not None
            found = {"checked": policy.monitor.checked, "lower": policy.monitor.lower, "upper": policy.monitor.upper}
            setting = {"level": level, "spot_check": spot_check, "text": name, "prompts": len(prompts)}
            rows.append({**setting, **truths[level, name], **found, "tokens": tokens, "fell": fell})
            print(rows[-1], flush=True)
    return rows


def _truth(model: adi.Model, policy: adi.Reflex, prompts: list[Any]) -> dict[str, float]:
    """The risk of reflex texts over all their tokens, nothing checked meanwhile, and the mean depth."""
    plain = adi.generate_batch(model, prompts, policy, max_new_tokens=FAR_TOKENS)
    told = tell(model.backbone, None, [(g.prompt_ids, g.token_ids) for g in plain])
    risk = mean(disagreement(t.said_T, t.full_T) for t in told)
    return {"risk": risk, "mean_depth": mean(s.depth for g in plain for s in g.steps)}


def _watched(model: adi.Model, policy: adi.Reflex, prompts: list[Any]) -> tuple[int, int | None]:
    """Tokens said under the certificate, and after how many of them decoding fell back to verified, if it did."""
    tokens = 0
    for prompt in prompts:
        text = adi.generate(model, prompt, policy, max_new_tokens=FAR_TOKENS)
        assert text.drift is not None
        if text.drift.fell_back_at is not None:
            return tokens + text.drift.fell_back_at, tokens + text.drift.fell_back_at
        tokens += len(text.steps)
    return tokens, None
