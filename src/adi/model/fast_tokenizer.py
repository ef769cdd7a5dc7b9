"""Plain tokenizers, read without transformers, whose import would hold up a start.

A tokenizer is plain where all of it is in ``tokenizer.json``, its configuration only names special tokens, and its chat
template says no more than texts, roles and contents in loops and conditions: then the ``tokenizers`` library and Jinja give
what transformers would give with them. Everything else about it, and every other tokenizer, is left to transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from adi.files import read_json

CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
STATED = {*NAMED, "backend", "is_local", "local_files_only", "model_max_length", "tokenizer_class"}
ELSEWHERE = ("special_tokens_map.json", "added_tokens.json", "additional_chat_templates")  # files that say more
MOST_TOKENS = 100_000  # of larger vocabularies transformers mends some
TEMPLATE_PARTS = {
    *("Template", "Output", "TemplateData", "For", "If", "Name", "Const", "Getattr", "Getitem"),
    *("Add", "Concat", "Compare", "Operand", "Not", "And", "Or"),
}
ATTRIBUTES = {"first", "last", "index", "index0", "role", "content"}


class FastTokenizer:
    """What ``Tokenizer`` asks of a transformers tokenizer; for all else it is one, which ``whole`` reads when it is needed."""

    def __init__(self, tokens: Any, named: Mapping[str, str], template: str | None, whole: Callable[[], Any]) -> None:
        self._tokens, self._named, self._read = tokens, named, whole
        self.chat_template = template
        self.eos_token_id = tokens.token_to_id(named["eos_token"]) if "eos_token" in named else None
        self.all_special_tokens = list(dict.fromkeys(named.values()))
        self.added_tokens_decoder = tokens.get_added_tokens_decoder()

    def __call__(
        self, text: str, *, split_special_tokens: bool | None = None, add_special_tokens: bool = True, **more: Any
    ) -> Any:
        """Token ids under ``input_ids``; read here only where ``split_special_tokens`` is given, as adi always does, so that
        others find all that transformers returns."""
        if more or split_special_tokens is None or not isinstance(text, str):
            more |= {} if split_special_tokens is None else {"split_special_tokens": split_special_tokens}
            return self._whole(text, add_special_tokens=add_special_tokens, **more)
        if self._tokens.encode_special_tokens != split_special_tokens:
            self._tokens.encode_special_tokens = split_special_tokens
        return {"input_ids": self._tokens.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False, **more: Any) -> str:
        """The text of these ids; spaces are not cleaned up in it."""
        cleaned = more.pop("clean_up_tokenization_spaces", None)
        if cleaned or more or isinstance(ids, int):
            more |= {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": cleaned}
            return str(self._whole.decode(ids, **more))
        return str(self._tokens.decode(ids, skip_special_tokens=skip_special_tokens))

    @property
    def backend_tokenizer(self) -> Any:
        """The tokenizer of the ``tokenizers`` library."""
        return self._tokens

    def get_vocab(self) -> dict[str, int]:
        """All tokens' ids."""
        return dict(self._tokens.get_vocab(with_added_tokens=True))

    def apply_chat_template(
        self, messages: Any, tokenize: bool = True, add_generation_prompt: bool = False, **more: Any
    ) -> Any:
        """The conversation as a text, by Jinja alone where every message is a role and a text."""
        if more or tokenize or self.chat_template is None or not all(map(_only_says, messages)):
            more |= {"tokenize": tokenize, "add_generation_prompt": add_generation_prompt}
            return self._whole.apply_chat_template(messages, **more)
        return self._filled.render(messages=messages, add_generation_prompt=add_generation_prompt, **self._named)

    @cached_property
    def _filled(self) -> Any:
        return _environment().from_string(self.chat_template)

    @cached_property
    def _whole(self) -> Any:
        return self._read()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_read" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._whole, name)


def fast_tokenizer(folder: Path, whole: Callable[[], Any]) -> FastTokenizer | None:
    """The tokenizer of a folder, None where it is not plain; ValueError for files that cannot be read."""
    config, tokens = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not (config.exists() and tokens.exists()) or any((folder / name).exists() for name in ELSEWHERE):
        return None
    stated = read_json(config, "tokenizer configuration")
    if not isinstance(stated, dict) or not set(stated) <= STATED or stated.get("tokenizer_class") not in CLASSES:
        return None
    from tokenizers import Tokenizer as Tokens

    try:
        made = Tokens.from_file(str(tokens))
    except Exception:  # transformers has the better sentence for a damaged file
        return None
    named = {name: stated[name] for name in NAMED if stated.get(name) is not None}
    special = {str(token) for token in made.get_added_tokens_decoder().values() if token.special}
    if any(type(token) is not str or token not in special for token in named.values()):
        return None
    if made.padding or made.truncation or made.post_processor is None or made.get_vocab_size() > MOST_TOKENS:
        return None
    page = folder / "chat_template.jinja"
    template = page.read_text(encoding="utf-8") if page.exists() else None
    return FastTokenizer(made, named, template, whole) if template is None or is_plain(template) else None


def _only_says(message: Any) -> bool:
    """Whether it is a role and a text, or a role and parts."""
    return isinstance(message, dict) and {name: type(value) for name, value in message.items()} in (
        {"role": str, "content": str},
        {"role": str, "content": list},
    )


def is_plain(template: str) -> bool:
    """Whether a chat template holds nothing that transformers adds to Jinja or keeps from it."""
    from jinja2 import TemplateError, nodes

    try:
        tree = _environment().parse(template)
    except TemplateError:
        return False
    parts = [tree, *tree.find_all(nodes.Node)]
    named = {part.attr for part in parts if isinstance(part, nodes.Getattr)}
    return {type(part).__name__ for part in parts} <= TEMPLATE_PARTS and named <= ATTRIBUTES


def _environment() -> Any:
    """Jinja as transformers sets it up."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
