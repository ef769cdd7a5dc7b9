"""Prompts about passages, for training drafters: `python tools/passages.py > passages.jsonl`.

The passages are earlier answers of the default model, from the datastore of its exits; each gets one or two of the tasks that
people ask about a text: summarise, extract, translate a sentence, answer, rewrite. So the drafter sees answers that lean on
their prompt, which prompts that a model writes by itself seldom ask for. No prompt of the benchmark is among them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator

import numpy as np

import adi
from adi.artifact import load_exits

MODEL = "smollm2-135m"
SHORTEST, LONGEST = 40, 170  # words of a passage
LANGUAGES = ("French", "German", "Spanish", "Italian", "Portuguese", "Dutch")
ABOUT_PASSAGES = {
    "summarisation": (
        "Summarise the following text in {n} sentences.",
        "Summarise this passage in {n} bullet points.",
        "What is the main point of this text?",
        "Cut this down to about {w} words.",
        "Write a one-paragraph summary of the following for someone who knows nothing about it.",
        "tl;dr please",
        "Please tell me in two sentences what this is about.",
        "Write a headline for this text, then a summary of one sentence.",
    ),
    "extraction": (
        "List the names of people, places and things in this text.",
        "Extract the key facts from the following text as a JSON object.",
        "Make a table with two columns, topic and what is said about it, from this text.",
        "Which claims are made in this text? Give them as short statements, one a line.",
        "List all numbers and dates in the text, each with what it refers to.",
        "Pick out {n} key terms from this passage and explain each in a few words.",
        "Write {n} questions that this text answers, each with its answer.",
    ),
    "writing": (
        "Rewrite this text in a friendlier tone.",
        "Rewrite the following so that a child can understand it.",
        "Continue this text with one more paragraph.",
        "Turn this into a short email to a colleague.",
        "Correct the mistakes in this text and make it more fluent.",
    ),
    "chat": (
        "Do you agree with the following? Why, or why not?",
        "I read this today. What do you think I should do with it?",
        "What is missing from this text? Make {n} suggestions.",
    ),
}
ABOUT_SENTENCES = {
    "translation": (
        "Translate into {language}: {sentence}",
        'Please put this into {language}: "{sentence}"',
        'How would you say "{sentence}" in {language}?',
        "Translate the following into formal {language}: {sentence}",
    ),
    "question-answering": (
        'Is the following true, and why? "{sentence}"',
        'Explain what is meant by: "{sentence}"',
        'Give an example for this: "{sentence}"',
    ),
}


def passages() -> list[str]:
    """Answers without unfinished sentences, cut at the end of a sentence to at most ``LONGEST`` words."""
    answers, tokenizer = load_exits(MODEL).answers, adi.load(MODEL, backend="hf").tokenizer
    assert answers is not None
    assert tokenizer is not None
    found = []
    for ids in np.split(answers.ids_N, np.cumsum(answers.lengths_M)[:-1]):
        text = tokenizer.decode(ids[2:].tolist()).strip()
        kept, words = "", 0
        for sentence in re.findall(r".+?(?:[.!?:]['\"]?(?=\s)|\n)\s*", text, re.DOTALL):
            words += len(sentence.split())
            if words > LONGEST:
                break
            kept += sentence
        if len(kept.split()) >= SHORTEST:
            found.append(kept.strip())
    return found


def asked(passage: str, rng: random.Random) -> Iterator[dict[str, str]]:
    """A prompt about the passage, and for half of them one about one of its sentences."""
    category = rng.choice(["summarisation"] * 3 + ["extraction"] * 3 + ["writing", "chat"])
    task = rng.choice(ABOUT_PASSAGES[category]).format(
        n=rng.choice(["two", "three", "four", "five"]), w=rng.choice([25, 40, 60])
    )
    parts = [task, passage] if rng.random() < 0.7 else [passage, task]
    yield {"prompt": "\n\n".join(parts), "category": category}
    sentences = re.findall(r"[A-Z][^.!?\n:]{30,160}[.!?]", passage)
    if sentences and rng.random() < 0.5:
        category = rng.choice(["translation"] * 3 + ["question-answering"])
        task = rng.choice(ABOUT_SENTENCES[category])
        yield {"prompt": task.format(language=rng.choice(LANGUAGES), sentence=rng.choice(sentences)), "category": category}


def main() -> None:
    """Every passage once, in a fixed shuffled order."""
    rng = random.Random(0)
    rows = [row for passage in passages() for row in asked(passage, rng)]
    rng.shuffle(rows)
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
