"""What the shell says of text: its end, penalties, special tokens, log-probabilities, and a context that runs short."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import adi
from support import adi_


@pytest.fixture
def model(tiny_folder: Path) -> list[str]:
    return ["--model", str(tiny_folder), "--backend", "hf"]


def answer(*args: Any) -> dict[str, Any]:
    done = adi_("run", "hello dog", *args, "--json", "--ignore-eos")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)  # type: ignore[no-any-return]


# B6, B7
def test_penalties_biases_ends_and_logprobs_are_options_of_the_shell(model: list[str], tiny_model: adi.Model) -> None:
    free = answer(*model, "-n", 12)["token_ids"]
    first, later = free[0], next(token for token in free if token != free[0])
    options: Any = {"max_new_tokens": 12, "stop_at_eos": False}
    pairs: list[tuple[list[Any], dict[str, Any]]] = [
        (["--logit-bias", f"{first}=-100,7=0.5"], {"logit_bias": {first: -100, 7: 0.5}}),
        (["--frequency-penalty", 0.5, "--presence-penalty", 0.25], {"frequency_penalty": 0.5, "presence_penalty": 0.25}),
        (["--no-repeat-ngram-size", 2], {"no_repeat_ngram_size": 2}),
        (["--bad-word", "dog", "--bad-word", "fox", "--min-new-tokens", 3], {"bad_words": ["dog", "fox"], "min_new_tokens": 3}),
        (["--stop-token-ids", f"3,{later}"], {"stop_token_ids": [3, later]}),
    ]
    for given, wanted in pairs:
        assert answer(*model, "-n", 12, *given)["token_ids"] == list(
            adi.generate(tiny_model, "hello dog", **{**options, **wanted}).token_ids
        )
    told = answer(*model, "-n", 4, "--logprobs", 2)
    assert [step[0]["token"] for step in told["logprobs"]] == told["token_ids"] == free[:4]
    assert all(len(step) == 2 and step[0]["logprob"] <= 0 and math.isfinite(step[1]["logprob"]) for step in told["logprobs"])
    for wrong in (["--logit-bias", "7"], ["--stop-token-ids", "a"]):
        assert adi_("run", "hello", *model, *wrong).exit_code == 2


# B5
def test_special_tokens_are_kept_in_the_shells_text(model: list[str], tiny_tokenizer: Any) -> None:
    mark = tiny_tokenizer.convert_tokens_to_ids("<|user|>")
    bias = ["-n", 3, "--logit-bias", f"{mark}=100"]
    assert answer(*model, *bias)["text"] == ""
    assert answer(*model, *bias, "--keep-special-tokens")["text"] == "<|user|>" * 3
    assert answer(*model, *bias, "--stop", "<|user|>")["finish"] == "stop"


# B9, A22
def test_the_answer_takes_what_the_context_still_holds(model: list[str], tiny_model: adi.Model) -> None:
    prompt = len(tiny_model.encode("hello dog"))
    told = answer(*model, "-n", 0, "--mode", "full")
    assert (told["tokens"], told["finish"]) == (512 - prompt, "length")
    done = adi_("run", "hello dog", *model, "-n", 100_000)
    assert done.exit_code == 2
    assert f"max_new_tokens is 100000, and the model's context is 512 tokens, of which the prompt takes {prompt}" in done.stderr


# B9
def test_a_conversation_goes_on_where_the_context_runs_short(model: list[str]) -> None:
    lines = "\n".join(["the quick brown fox jumps over the lazy dog " * 6] * 4)
    done = adi_("chat", *model, "--mode", "full", "-n", 120, text=f"{lines}\n/bye\n")
    assert done.exit_code == 0
    assert "The context is full: the oldest 2 messages are forgotten." in done.stdout
    assert "reset" not in done.stdout
    done = adi_("chat", *model, "--mode", "full", "-n", 20, text="the quick brown fox " * 300 + "\n/bye\n")
    assert "the model's context of 512 leaves none for an answer" in done.stdout
