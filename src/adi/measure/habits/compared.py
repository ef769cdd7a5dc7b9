"""Before and after on prompts that nothing learned from: full depth, before and after take turns on every prompt, so that a
machine whose speed drifts favours nobody."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypedDict

from adi.artifact import Exits
from adi.decoding.generate import generate
from adi.decoding.policies import Policy
from adi.decoding.records import Generation
from adi.decoding.teacher_forcing import KnownText, forced_pass, full_tokens
from adi.files import write_json
from adi.measure.statistics import clustered_median
from adi.model.backbone import Backbone
from adi.model.load import Model
from adi.progress import Progress, no_progress
from adi.schema import read_json_as

Ids = tuple[int, ...]
FEWEST = 4  # prompts of each kind that are measured, whatever the budget


class Row(TypedDict):
    """One prompt, measured: figures by the name of the policy."""

    kind: str
    category: str
    tokens: int
    same: bool
    seconds: dict[str, float]
    rounds: dict[str, int]
    drafted: dict[str, int]
    accepted: dict[str, int]


@dataclass
class Compared:
    """Full depth, before and after in turn on prompts of the workload and on others, prompt by prompt, for one engine.

    ``path`` keeps what is finished; it goes on there.
    """

    model: Model
    policies: Mapping[str, Policy]
    max_new_tokens: int
    path: Path

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            self.rows = [dict(row) for row in read_json_as(self.path, list[Row], "file of measured prompts")]

    def run(self, prompts: Sequence[tuple[str, str, Ids]], seconds: float, progress: Progress = no_progress) -> None:
        """Measure these (kind, category, ids), of each kind at least ``FEWEST``, others as long as there are ``seconds``."""
        began, todo = time.monotonic(), prompts[len(self.rows) :]
        if todo:
            for policy in self.policies.values():  # compiled and measured before anything is timed
                generate(self.model, todo[0][2], policy, max_new_tokens=min(8, self.max_new_tokens))
        for number, (kind, category, ids) in enumerate(todo, len(self.rows)):
            if number >= 2 * FEWEST and time.monotonic() - began > seconds:
                break
            self.rows.append({"kind": kind, "category": category, **self._in_turn(number, ids)})
            write_json(self.path, self.rows)
            progress(number + 1, len(prompts), f"measuring, {self.model.backbone.spec.precision}")

    def _in_turn(self, number: int, ids: Ids) -> dict[str, Any]:
        names = list(self.policies)
        found: dict[str, Generation] = {}
        for i in range(len(names)):
            name = names[(number + i) % len(names)]
            found[name] = generate(self.model, ids, self.policies[name], max_new_tokens=self.max_new_tokens)
        full = found["full"].token_ids
        return {
            "tokens": len(full),
            "same": all(one.token_ids == full for one in found.values() if one.verified),
            "seconds": {name: one.counters.seconds for name, one in found.items()},
            "rounds": {name: one.counters.rounds for name, one in found.items()},
            "drafted": {name: one.counters.drafted for name, one in found.items()},
            "accepted": {name: one.counters.accepted for name, one in found.items()},
        }


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of measured prompts: medians and 95% intervals of paired ratios of speed, tokens a pass, drafts kept, and the share of
    verified texts that are full depth's."""
    names = [name for name in rows[0]["seconds"] if name != "full"]
    found: dict[str, Any] = {"prompts": len(rows), "tokens": sum(row["tokens"] for row in rows)}
    found["same_text"] = sum(row["same"] for row in rows) / len(rows)
    for name in ("full", *names):
        tokens = found["tokens"]
        drafted, accepted = (sum(row[what][name] for row in rows) for what in ("drafted", "accepted"))
        found[name] = {
            "tokens_per_second": median(row["tokens"] / row["seconds"][name] for row in rows),
            "tokens_per_pass": tokens / max(1, sum(row["rounds"][name] for row in rows)),
            "accepted_share": accepted / drafted if drafted else None,
            "ratio": _ratio(rows, "full", name),
        }
    if {"before", "after"} <= {*names}:
        found["after_to_before"] = _ratio(rows, "before", "after")
    return found


def _ratio(rows: Sequence[Mapping[str, Any]], slow: str, fast: str) -> list[float]:
    found = clustered_median([[row["seconds"][slow] / row["seconds"][fast] for row in rows]])
    return [found.median, found.low, found.high]


def by_category(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same of every category by itself."""
    names = sorted({row["category"] for row in rows})
    return {name: summary_of([row for row in rows if row["category"] == name]) for name in names}


def written_by(model: Model, ids: Ids, policies: Mapping[str, Policy], tokens: int) -> dict[str, list[list[Any]]]:
    """One text by each policy: every token's spelling and who wrote it, ``memory``, ``drafter`` or ``full``."""
    found = {}
    for name, policy in policies.items():
        steps = generate(model, ids, policy, max_new_tokens=tokens).steps
        found[name] = [[step.text, step.level] for step in steps]
    return found


def shallowest(backbone: Backbone, exits: Exits, prompt: Ids, answer: Ids) -> list[int]:
    """For each token of an answer the shallowest depth whose exit says it, full depth where none does."""
    text = KnownText.of_answer(prompt, answer)
    (seen,) = forced_pass(backbone, [text], exits.depths)
    read, token_N = exits.reader(backbone), full_tokens(backbone, seen.deep_ND)
    depth_N = [backbone.spec.layers] * len(token_N)
    for depth in reversed(exits.depths):
        right = (read(depth, seen.hidden[depth]).tokens_T.cpu() == token_N).tolist()
        depth_N = [depth if is_right else known for is_right, known in zip(right, depth_N, strict=True)]
    return depth_N
