"""Text token by token: the pieces joined are the text, whatever the tokens cut through."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adi
from adi.model.tokenizer import Detokenizer, Tokenizer

_KEPT: dict[str, Tokenizer] = {}


@pytest.fixture(scope="module", autouse=True)
def _keep(tiny_tokenizer: Any) -> None:
    _KEPT["tokenizer"] = Tokenizer(tiny_tokenizer)


@given(st.text(max_size=30))
def test_pieces_join_to_the_text(text: str) -> None:
    tokenizer = _KEPT["tokenizer"]
    text = text.encode("utf-8", "ignore").decode()
    ids = tokenizer.encode(text)
    pieces = Detokenizer(tokenizer)
    joined = "".join(pieces.push(token) for token in ids)
    assert joined + pieces.finish() == tokenizer.decode(ids)


@given(st.lists(st.integers(4, 299), max_size=30))
def test_pieces_of_arbitrary_tokens_join_to_what_they_decode_to(ids: list[int]) -> None:
    tokenizer = _KEPT["tokenizer"]
    pieces = Detokenizer(tokenizer)
    joined = "".join(pieces.push(token) for token in ids)
    assert (joined + pieces.finish()).rstrip("\ufffd") == tokenizer.decode(ids).rstrip("\ufffd")


def test_no_piece_ends_inside_a_character(tiny_tokenizer: Any) -> None:
    tokenizer = Tokenizer(tiny_tokenizer)
    pieces = Detokenizer(tokenizer)
    given = [pieces.push(token) for token in tokenizer.encode("a 😀 b")]
    assert "\ufffd" not in "".join(given)
    assert "😀" in "".join(given)


def test_without_a_tokenizer_tokens_are_spelled_as_numbers() -> None:
    pieces = Detokenizer(None)
    assert "".join(pieces.push(token) for token in (5, 17, 3)) == "5 17 3"


def test_prompts_of_every_kind(tiny_model: adi.Model) -> None:
    assert tiny_model.tokenizer is not None
    one = tiny_model.encode("hello dog")
    assert one == tiny_model.encode([{"role": "user", "content": "hello dog"}])
    assert tiny_model.tokenizer.hf.decode(one) == "<|user|>hello dog<|end|><|assistant|>"
    assert tiny_model.encode("hello dog", raw=True) == tiny_model.tokenizer.encode("hello dog")
    assert tiny_model.encode([5, 6, 7]) == (5, 6, 7)


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ([], "empty"),
        ([5, 999], "999"),
        ([-1], "-1"),
        (3.5, "float"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": "a"}, 5], "list of messages"),
    ],
)
def test_prompts_that_cannot_be_meant(tiny_model: adi.Model, prompt: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        tiny_model.encode(prompt)


def test_a_model_without_chat_template_says_what_to_do(tiny_hf: Any, tiny_tokenizer: Any) -> None:
    import copy

    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    model = adi.load(tiny_hf, tokenizer=plain)
    with pytest.raises(ValueError, match="no chat template; use raw=True"):
        adi.generate(model, "hello", adi.FullDepth())
    assert adi.generate(model, "hello", adi.FullDepth(), raw=True, max_new_tokens=2).token_ids


def test_a_model_without_tokenizer_takes_ids_only(llama: adi.Model) -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        adi.generate(llama, "hello", adi.FullDepth())
