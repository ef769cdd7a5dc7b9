"""The best rules of the trigger study, run: ``python tools/trigger_runs.py EXITS OUT.json``.

Full depth, the ladder (memory and drafter, which ask no exit), the trigger that comes with the exits, and the rules that
``docs/results/triggers.json`` estimates highest, in turn on the same prompts of the benchmark, which none was chosen on.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import adi
from adi.decoding.policies import trigger_of
from adi.exits.triggers import trigger_from_json
from adi.measure.circumstances import circumstances
from adi.measure.statistics import bootstrap_median
from adi.measure.timing import Outcome, timed
from adi.prompts import read_prompts, spread

STUDY = Path(__file__).resolve().parent.parent / "docs" / "results" / "triggers.json"
PROMPTS, NEW_TOKENS, RULES, WARM_UP = 20, 64, 3, 12


def policies(exits: adi.Exits, study: dict[str, Any]) -> dict[str, tuple[adi.Policy, float | None]]:
    """Names to policies and, for rules of the study, the estimated ratio against full depth."""
    found: dict[str, tuple[adi.Policy, float | None]] = {
        "full depth": (adi.FullDepth(), None),
        "ladder": (adi.Verified(exits), None),
        "entropy as shipped": (adi.Verified(exits, trigger=exits.trigger), None),
    }
    for one in [one for one in study["estimates"] if one["trigger"] is not None][:RULES]:
        rule = trigger_from_json(one["trigger"])
        found[one["rule"]] = (adi.Verified(exits, trigger=rule, draft_tokens=one["draft_tokens"]), one["ratio"])
    return found


def main(folder: str, out: Path) -> None:
    model, exits = adi.load("smollm2-135m"), adi.load_exits(folder)
    study = json.loads(STUDY.read_text())
    chosen = policies(exits, study)
    items = spread(read_prompts("bench"), PROMPTS)
    prompts = [model.encode(item.prompt) for item in items]
    for policy, _ in chosen.values():
        rule = trigger_of(policy)
        stops = [depth for depth in exits.depths if rule.may_fire(depth)]
        model.backbone.prepare(stops, drafts=not isinstance(policy, adi.FullDepth), wait=True)
        timed(model, policy, prompts[0], WARM_UP)
    load = os.getloadavg()[0]
    outcomes: dict[str, list[Outcome]] = {name: [] for name in chosen}
    for ids in prompts:
        for name, (policy, _) in chosen.items():
            outcomes[name].append(timed(model, policy, ids, NEW_TOKENS))
    full, ladder = outcomes["full depth"], outcomes["ladder"]
    runs = []
    for name, mine in outcomes.items():
        ratios = {
            base: asdict(
                bootstrap_median([a.tokens_per_second / b.tokens_per_second for a, b in zip(mine, other, strict=True)])
            )
            for base, other in (("full", full), ("ladder", ladder))
        }
        drafted = sum(o.drafted or 0 for o in mine)
        runs.append(
            {
                "name": name,
                "tokens_per_second": median(o.tokens_per_second for o in mine),
                "ratios": ratios,
                "estimated_ratio": chosen[name][1],
                "trigger": trigger_of(chosen[name][0]).to_json(),
                "draft_tokens": getattr(chosen[name][0], "draft_tokens", None),
                "tokens_per_round": sum(len(o.token_ids) for o in mine) / sum(o.rounds or 1 for o in mine),
                "accepted_share": sum(o.accepted or 0 for o in mine) / drafted if drafted else None,
                "same_text": all(a.token_ids == b.token_ids for a, b in zip(mine, full, strict=True)),
            }
        )
    made = circumstances("python tools/trigger_runs.py EXITS docs/results/trigger_runs.json", items)
    spec = model.backbone.spec
    about = {
        "model": spec.name,
        "backend": spec.backend,
        "precision": spec.precision,
        "max_new_tokens": NEW_TOKENS,
        "load": load,
    }
    out.write_text(json.dumps({**made, **about, "runs": runs}, indent=1) + "\n")
    for run in runs:
        print(run["name"], f"{run['tokens_per_second']:.1f}", run["ratios"]["full"], run["same_text"])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
