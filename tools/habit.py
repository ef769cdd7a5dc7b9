"""What use does to verified decoding with habits: `python tools/habit.py` writes docs/results/habits.json.

Four kinds of task, each asked eight times with other details, and an unrelated question after every one of them as control.
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
}


def ask(model: Any, prompt: str, habits: Habits | None) -> float:
    """Tokens per full pass of the answer; its first token, which costs a pass of the prompt, is left out."""
    done = adi.generate(model, prompt, Verified(adi.load_exits("smollm2-135m"), habits=habits), max_new_tokens=TOKENS)
    return (len(done.token_ids) - 1) / max(1, done.counters.rounds - 1)


def main() -> None:
    """Ask everything in turn, with habits and without."""
    model = adi.load("smollm2-135m")
    others = [item.prompt for item in read_prompts("bench")][::2][: 8 * len(KINDS)]
    assert model.tokenizer is not None
    known = {"fingerprint": tokenizer_fingerprint(model.tokenizer), "vocabulary": model.backbone.spec.vocabulary}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        habits = Habits.open(Path(folder) / "habits", **known)
        for time in range(8):
            for i, (kind, text) in enumerate(KINDS.items()):
                prompt = text.format(name=NAMES[time], thing=THINGS[time], city=CITIES[time])
                for label, asked in ((kind, prompt), ("unrelated", others[time * len(KINDS) + i])):
                    with_habits, without = ask(model, asked, habits), ask(model, asked, None)
                    rows.append({"time": time + 1, "kind": label, "habits": with_habits, "none": without})
                    print(rows[-1], flush=True)
    table = []
    for time in range(1, 9):
        now = [row for row in rows if row["time"] == time]
        kinds = {
            label: [r for r in now if (r["kind"] == "unrelated") == (label == "unrelated")] for label in ("same", "unrelated")
        }
        table.append({"time": time} | {f"{k}_{w}": mean(r[w] for r in v) for k, v in kinds.items() for w in ("habits", "none")})
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
