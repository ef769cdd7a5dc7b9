"""The checkable tasks of docs/reflex.md: enough of them, each with a pattern that a right answer meets and silence does not."""

from __future__ import annotations

import json
import re
from pathlib import Path

TASKS = Path(__file__).parent.parent / "tools" / "data" / "tasks.jsonl"
RIGHT = {
    "fact": "Paris, France",
    "arithmetic": "2 + 2 equals 4.",
    "copying": "The cat sat on the mat.",
    "extraction": "In Lisbon.",
}


def test_every_task_can_be_checked() -> None:
    tasks = [json.loads(line) for line in TASKS.read_text(encoding="utf-8").splitlines()]
    assert len(tasks) >= 30
    for task in tasks:
        assert not re.search(task["pattern"], ""), task
        assert not re.search(task["pattern"], "I am sorry, no answer comes to mind."), task
        if task["kind"] == "arithmetic":  # the question said again is no answer
            assert not re.search(task["pattern"], task["prompt"]), task
    for kind, answer in RIGHT.items():
        first = next(task for task in tasks if task["kind"] == kind)
        assert re.search(first["pattern"], answer), first
