"""What ends a text: stop strings, special tokens among them, and token ids; in every mode, alone, streamed and in a batch."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

import adi
from adi.decoding.records import Step
from adi.decoding.stop_strings import StopStrings
from conftest import random_exits

PROMPT = [5, 60, 7, 80]
TOKENS = 40


def modes(model: adi.Model) -> list[adi.Policy]:
    bare = adi.bare_exits(model, (2, 4))
    light = random_exits(model, (2, 4), adi.Never())
    reflex = adi.Reflex(light, trigger=adi.Never())
    return [adi.FullDepth(), adi.Verified(), adi.Verified(bare, adi.Always((2,)), draft_tokens=4), adi.Lookup(), reflex]


@pytest.fixture(scope="module")
def marked(tiny_hf: Any, tiny_tokenizer: Any) -> tuple[adi.Model, str, int, tuple[int, ...]]:
    """The tiny model with a special token that it says: its spelling, its place in the text, and the text's ids."""
    plain = adi.load(tiny_hf, tokenizer=tiny_tokenizer)
    ids = adi.generate(plain, PROMPT, adi.FullDepth(), max_new_tokens=TOKENS, stop_at_eos=False).token_ids
    place = next(i for i in range(9, TOKENS) if ids[i] not in ids[:i] and ids[i] not in tiny_tokenizer.all_special_ids)
    tokenizer, mark = copy.deepcopy(tiny_tokenizer), tiny_tokenizer.convert_ids_to_tokens(ids[place])
    tokenizer.add_special_tokens({"additional_special_tokens": [mark]})
    assert tokenizer.convert_tokens_to_ids(mark) == ids[place]
    return adi.load(tiny_hf, tokenizer=tokenizer), mark, place, ids


# A1
def test_a_stop_string_that_is_a_special_token_stops_in_every_mode_alone_streamed_and_in_a_batch(marked: Any) -> None:
    model, mark, place, ids = marked
    options: Any = {"max_new_tokens": TOKENS, "stop_at_eos": False, "stop": mark}
    for policy in modes(model):
        free = adi.generate(model, PROMPT, policy, max_new_tokens=TOKENS, stop_at_eos=False)
        assert mark not in free.text
        got = adi.generate(model, PROMPT, policy, **options)
        assert got.finish == "stop"
        assert got.token_ids == free.token_ids[:place] == ids[:place]
        assert free.text.startswith(got.text)
        assert "".join(step.text for step in adi.stream(model, PROMPT, policy, **options)) == got.text
        batch = adi.generate_batch(model, [PROMPT, PROMPT[:2], PROMPT], policy, **options)
        assert [one.token_ids for one in batch[::2]] == [got.token_ids] * 2


# A1
def test_a_stop_string_may_begin_before_a_special_token_or_go_on_after_it(marked: Any) -> None:
    model, mark, place, _ = marked
    free = adi.generate(model, PROMPT, adi.FullDepth(), max_new_tokens=TOKENS, stop_at_eos=False)
    before, after = ("".join(step.text for step in part) for part in (free.steps[:place], free.steps[place:]))
    for stop in (before[-1] + mark, mark + after[:2], before[-2:] + mark + after[:1]):
        got = adi.generate(model, PROMPT, adi.Verified(), max_new_tokens=TOKENS, stop_at_eos=False, stop=["no such", stop])
        assert (got.text, got.finish) == (before[: (before + mark + after).index(stop)], "stop")
    across = before[-2:] + after[:2]  # in the text as it is shown, the special token left out
    got = adi.generate(model, PROMPT, adi.Verified(), max_new_tokens=TOKENS, stop_at_eos=False, stop=across)
    assert (got.text, got.finish) == (before[:-2], "stop")


# A1
def test_stop_token_ids_end_the_text_as_end_tokens_do(marked: Any) -> None:
    model, _, place, ids = marked
    for policy in modes(model):
        got = adi.generate(model, PROMPT, policy, max_new_tokens=TOKENS, stop_at_eos=False, stop_token_ids=[3, ids[place]])
        assert (got.token_ids, got.finish) == (ids[: place + 1], "stop")
    (one, _) = adi.generate_batch(model, [PROMPT, [1]], max_new_tokens=TOKENS, stop_token_ids=torch.tensor([ids[0]]))  # type: ignore[arg-type]
    assert (one.token_ids, one.finish) == (ids[:1], "stop")
    for bad in ([-1], [304], [True], ["2"]):
        with pytest.raises(adi.errors.UsageError, match=r"a token of stop_token_ids is .*from 0 to 303"):
            adi.generate(model, PROMPT, stop_token_ids=bad)


def test_an_end_token_ends_the_answer_before_a_stop_string_of_its_spelling(marked: Any) -> None:
    model, mark, place, ids = marked
    ending = adi.Model(model.backbone, model.tokenizer, frozenset({ids[place]}))
    got = adi.generate(ending, PROMPT, max_new_tokens=TOKENS, stop=mark)
    assert (got.token_ids, got.finish) == (ids[: place + 1], "eos")


def test_no_stop_string_is_no_stop(tiny_model: adi.Model) -> None:
    texts = [adi.generate(tiny_model, PROMPT, max_new_tokens=9, stop=stop).text for stop in (None, (), [])]
    assert len(set(texts)) == 1


def test_events_are_held_back_while_a_stop_string_may_begin_in_them() -> None:
    def step(text: str, token: int = 0) -> Step:
        return Step(0, token, text, 1, "full", 1, False, False, {}, (), (), 0.0)

    def pushed(*steps: Step) -> tuple[list[list[str]], str | None]:
        watcher = StopStrings(["ab", "<e>c"], lambda token: "<e>" if token == 7 else "")
        return [[event.text for event in watcher.push(one)] for one in steps if isinstance(one, Step)], watcher.hit  # type: ignore[union-attr]

    assert pushed(step("xa"), step("", 7), step("b")) == ([[], [], ["x"]], "ab")
    assert pushed(step("x"), step("", 7), step("c")) == ([["x"], [], []], "<e>c")
    assert pushed(step("x"), step("", 7), step("d"), step("ay")) == ([["x"], [], ["", "d"], ["ay"]], None)


# B5
def test_special_tokens_are_kept_in_the_text_on_request(marked: Any) -> None:
    model, mark, place, ids = marked
    tokenizer = model.tokenizer.hf
    options: Any = {"max_new_tokens": TOKENS, "stop_at_eos": False, "skip_special_tokens": False}
    for policy in modes(model):
        got = adi.generate(model, PROMPT, policy, **options)
        assert got.text == tokenizer.decode(list(got.token_ids), skip_special_tokens=False)
        assert got.steps[place].text.endswith(mark)
        assert "".join(step.text for step in adi.stream(model, PROMPT, policy, **options)) == got.text
        assert adi.generate_batch(model, [PROMPT], policy, **options)[0].text == got.text
        stopped = adi.generate(model, PROMPT, policy, **options, stop=mark)
        assert (stopped.text, stopped.finish) == (got.text[: got.text.index(mark)], "stop")
    ending = adi.Model(model.backbone, model.tokenizer, frozenset({ids[place]}))
    assert adi.generate(ending, PROMPT, max_new_tokens=TOKENS, skip_special_tokens=False).text.endswith(mark)
    assert mark not in adi.generate(ending, PROMPT, max_new_tokens=TOKENS).text


# B9
def test_without_a_number_the_text_fills_the_context(tiny_model: adi.Model, tiny_hf: Any) -> None:
    for policy in (adi.FullDepth(), adi.Verified()):
        got = adi.generate(tiny_model, [5] * 500, policy, max_new_tokens=None, stop_at_eos=False)
        assert (len(got.token_ids), got.finish) == (12, "length")
    batch = adi.generate_batch(tiny_model, [[5] * 500, [5] * 511], max_new_tokens=None, stop_at_eos=False)
    assert [len(one.token_ids) for one in batch] == [12, 1]
    for asked in (None, 1, 256):
        with pytest.raises(adi.errors.UsageError, match="prompt has 512 tokens, and the model's context of 512 leaves none"):
            adi.generate(tiny_model, [5] * 512, max_new_tokens=asked)
    endless = replace(tiny_model, backbone=copy.copy(tiny_model.backbone))
    endless.backbone.spec = replace(tiny_model.backbone.spec, context=None)  # type: ignore[misc]
    with pytest.raises(adi.errors.UsageError, match="states no context that could be filled; give a number"):
        adi.generate(endless, [5], max_new_tokens=None)


# A22
def test_a_number_of_tokens_beyond_the_context_is_named_as_what_is_wrong(tiny_model: adi.Model) -> None:
    with pytest.raises(
        adi.errors.UsageError, match=r"max_new_tokens is 100000, .* context is 512 .* takes 3; lower it to at most 509"
    ):
        adi.generate(tiny_model, [5, 6, 7], max_new_tokens=100_000)


# B7
def test_logprobs_are_the_full_models_and_the_drawn_token_is_among_them(tiny_model: adi.Model, tiny_hf: Any) -> None:
    hot: Any = {"max_new_tokens": 12, "temperature": 1.7, "seed": 1, "stop_at_eos": False}
    for policy in (adi.FullDepth(), adi.Verified(), adi.Verified(adi.bare_exits(tiny_model, (2,)), adi.Always((2,)))):
        for count in (0, 2):
            got = adi.generate(tiny_model, PROMPT, policy, **hot, logprobs=count)
            with torch.no_grad():
                logits = tiny_hf(torch.tensor([PROMPT + list(got.token_ids)])).logits[0]
            outside = 0
            for place, step in enumerate(got.steps, len(PROMPT) - 1):
                wanted = logits[place].log_softmax(-1)
                best = wanted.topk(count).indices.tolist()
                assert list(step.logprobs) == best + [step.token] * (step.token not in best)
                assert all(abs(wanted[token] - value) < 1e-4 for token, value in step.logprobs.items())
                outside += step.token not in best
            assert outside > 3
    assert adi.generate(tiny_model, PROMPT, max_new_tokens=3).steps[0].logprobs == {}
