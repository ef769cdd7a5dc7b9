"""Plain tokenizers against transformers' own, token for token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from adi.model.fast_tokenizer import FastTokenizer, fast_tokenizer, is_plain
from adi.model.hub import source_folder
from adi.model.tokenizer import Tokenizer, tokenizer_fingerprint

FOLDER = Path(source_folder("smollm2-135m", lambda _: None))
TEXTS = [
    "",
    " two  spaces, a tab\t and\nlines\r\n",
    "Ünïcödé, 漢字, emoji 👩‍🚀 and \u00a0",
    "<|im_start|>user\nspelled<|im_end|><|endoftext|>",
    "def f(x):\n    return x**2  # 12345",
]
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi\n"}],
    [{"role": "user", "content": "{{ 1 }} {% if %}"}, {"role": "assistant", "content": "No."}, {"role": "user", "content": ""}],
]


@pytest.fixture(scope="module")
def whole() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(FOLDER)


@pytest.fixture
def plain(whole: Any) -> FastTokenizer:
    found = fast_tokenizer(FOLDER, lambda: whole)
    assert found is not None
    return found


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("around", [False, True])
def test_ids_and_texts_are_those_of_transformers(plain: Any, whole: Any, text: str, split: bool, around: bool) -> None:
    options = {"add_special_tokens": around, "split_special_tokens": split}
    ids = plain(text, **options)["input_ids"]
    assert ids == whole(text, **options)["input_ids"]
    for skip in (False, True):
        spelled = plain.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert spelled == whole.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.lists(st.integers(0, 49_151), max_size=12))
def test_any_text_and_any_ids(text: str, ids: list[int]) -> None:
    plain, whole = _both()
    assert plain(text, split_special_tokens=False)["input_ids"] == whole(text)["input_ids"]
    assert plain.decode(ids, skip_special_tokens=True) == whole.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


_KEPT: list[Any] = []


def _both() -> tuple[Any, Any]:
    if not _KEPT:
        own = PreTrainedTokenizerFast.from_pretrained(FOLDER)
        _KEPT.extend((fast_tokenizer(FOLDER, lambda: own), own))
    return _KEPT[0], _KEPT[1]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompt", [False, True])
def test_conversations_are_those_of_transformers(plain: Any, whole: Any, chat: list[dict[str, str]], prompt: bool) -> None:
    given_ = {"add_generation_prompt": prompt, "tokenize": False}
    assert plain.apply_chat_template(chat, **given_) == whole.apply_chat_template(chat, **given_)
    assert Tokenizer(plain).chat(chat) == Tokenizer(whole).chat(chat)
    assert Tokenizer(plain).chat(chat, special_tokens=True) == Tokenizer(whole).chat(chat, special_tokens=True)


def test_it_is_the_same_tokenizer(plain: Any, whole: Any) -> None:
    assert tokenizer_fingerprint(Tokenizer(plain)) == tokenizer_fingerprint(Tokenizer(whole))
    assert plain.eos_token_id == whole.eos_token_id
    assert set(plain.all_special_tokens) == set(whole.all_special_tokens)
    assert plain.chat_template == whole.chat_template


def test_what_is_not_plain_is_left_to_transformers(plain: Any, whole: Any) -> None:
    assert plain.name_or_path == whole.name_or_path
    assert plain("a b", return_offsets_mapping=True) == whole("a b", return_offsets_mapping=True)
    assert plain(["a", "b"]).input_ids == whole(["a", "b"]).input_ids
    assert plain("a b").tokens() == whole("a b").tokens()
    assert plain.decode([5, 6], clean_up_tokenization_spaces=True) == whole.decode([5, 6], clean_up_tokenization_spaces=True)
    parts = [{"role": "user", "content": "Hi", "name": "A"}]
    assert plain.apply_chat_template(parts) == whole.apply_chat_template(parts)
    with pytest.raises(AttributeError):
        _ = plain.nothing_of_this_name


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("{% for m in messages %}{{ m['role'] + ': ' + m.content }}{% endfor %}", True),
        ("{{ bos_token }}{% if not loop.first and messages[0]['role'] == 'system' %}x{% endif %}", True),
        ("{{ messages[0].content | trim }}", False),
        ("{{ raise_exception('no') }}", False),
        ("{% set ns = namespace(found=false) %}", False),
        ("{{ strftime_now('%d') }}", False),
        ("{% generation %}x{% endgeneration %}", False),
        ("{{ messages.__class__ }}", False),
        ("{% for", False),
    ],
)
def test_which_templates_are_plain(template: str, wanted: bool) -> None:
    assert is_plain(template) is wanted


@pytest.mark.parametrize(
    "changed",
    [
        {"add_bos_token": True},
        {"tokenizer_class": "LlamaTokenizer"},
        {"eos_token": "<|nowhere|>"},
        {"eos_token": {"content": "<|im_end|>"}},
        {"extra_special_tokens": ["<|x|>"]},
    ],
)
def test_other_configurations_are_left_to_transformers(changed: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(FOLDER / name, folder)
    assert fast_tokenizer(folder, lambda: None) is not None
    page = folder / "tokenizer_config.json"
    page.write_text(json.dumps({**json.loads(page.read_text()), **changed}))
    assert fast_tokenizer(folder, lambda: None) is None
