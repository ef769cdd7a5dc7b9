"""What use does to verified decoding with habits: `python tools/habit.py` writes docs/results/habits.json.

Ten kinds of task, each asked eight times with other details, and four unrelated questions among them each time as control.
Habits start empty, nothing is trained, every text is that of full depth. What counts is tokens per full pass.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import adi
from adi.decoding.policies import Verified
from adi.exits.habits import Habits
from adi.measure.statistics import bootstrap_median
from adi.model.tokenizer import tokenizer_fingerprint
from adi.prompts import read_prompts

OUT = Path(__file__).parent.parent / "docs" / "results" / "habits.json"
TOKENS = 96
NAMES = (
    "Anna Kowalska",
    "Ben Turner",
    "Chloe Martin",
    "David Okoye",
    "Elena Rossi",
    "Farid Haddad",
    "Grace Lindqvist",
    "Hugo Weber",
)
THINGS = ("bicycle", "laptop", "bookshelf", "camera", "kettle", "guitar", "tent", "printer")
CITIES = ("Lisbon", "Oslo", "Vienna", "Dublin", "Prague", "Athens", "Riga", "Bern")
KINDS = {
    "email": "Write a polite email to {name} asking when the {thing} I ordered will arrive.",
    "code": "Write a Python function that reads a list of {thing} records from a JSON file and returns the cheapest one.",
    "extraction": "Extract name, city and item as JSON from: {name} from {city} bought a {thing} yesterday.",
    "travel": "Give me a list of five things to do on a weekend in {city}.",
    "sql": "Write an SQL query that counts the {thing} orders of each customer in {city}.",
    "review": "Write a short product review of a {thing} that {name} bought.",
    "translation": 'Translate into French: "{name} sold a {thing} in {city} last week."',
    "explanation": "Explain in simple words how a {thing} is made.",
    "invitation": "Write an invitation from {name} to a small party in {city}.",
    "comparison": "Make a table with two columns that compares a new {thing} with a used one.",
}
CONTROLS = 4  # unrelated questions each time
GROUPS = {"1": (1,), "2": (2,), "3 and 4": (3, 4), "5 to 8": (5, 6, 7, 8)}


def ask(model: Any, prompt: str, habits: Habits | None) -> float:
    """Tokens per full pass of the answer; its first token, which costs a pass of the prompt, is left out."""
    done = adi.generate(model, prompt, Verified(adi.load_exits("smollm2-135m"), habits=habits), max_new_tokens=TOKENS)
    return (len(done.token_ids) - 1) / max(1, done.counters.rounds - 1)


def summed(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean tokens per pass of tasks that came again and of unrelated ones, and the ratios with habits to without."""
    found: dict[str, Any] = {"time": name}
    for label in ("same", "unrelated"):
        mine = [row for row in rows if (row["kind"] == "unrelated") == (label == "unrelated")]
        ratio = bootstrap_median([row["habits"] / row["none"] for row in mine])
        means = {way: mean(row[way] for row in mine) for way in ("habits", "none")}
        found[label] = {"texts": len(mine), **means, "ratio": ratio.median, "low": ratio.low, "high": ratio.high}
    return found


def main() -> None:
    """Ask everything in turn, with habits and without."""
    model = adi.load("smollm2-135m")
    others = [item.prompt for item in read_prompts("bench")][::2][: 8 * CONTROLS]
    assert model.tokenizer is not None
    known = {"fingerprint": tokenizer_fingerprint(model.tokenizer), "vocabulary": model.backbone.spec.vocabulary}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        habits = Habits.open(Path(folder) / "habits", **known)
        for time in range(8):
            own = [(kind, text.format(name=NAMES[time], thing=THINGS[time], city=CITIES[time])) for kind, text in KINDS.items()]
            control = [("unrelated", text) for text in others[time * CONTROLS : (time + 1) * CONTROLS]]
            for label, asked in [*(pair for both in zip(own, control, strict=False) for pair in both), *own[CONTROLS:]]:
                with_habits, without = ask(model, asked, habits), ask(model, asked, None)
                rows.append({"time": time + 1, "kind": label, "habits": with_habits, "none": without})
                print(rows[-1], flush=True)
    table = [summed(name, [row for row in rows if row["time"] in times]) for name, times in GROUPS.items()]
    result = {
        "model": "smollm2-135m",
        "precision": model.backbone.spec.precision,
        "tokens": TOKENS,
        "by_time": table,
        "rows": rows,
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
