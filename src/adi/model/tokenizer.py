"""Text to token ids and back, one token at a time."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from adi.errors import ModelError, UsageError
from adi.files import read_text
from adi.model.messages import check_options, normal, variants
from adi.model.prompt import ChatKeywords, Message

UNFINISHED = "\ufffd"
ENCODING = threading.Lock()  # an attribute of the tokenizer, shared by all threads, says how to read special tokens
KEPT_SPELLINGS = 65_536  # of lone tokens: drafts and texts under way ask for the same ones again and again


class Tokenizer:
    """A transformers tokenizer behind the few things that adi needs of one."""

    def __init__(self, tokenizer: Any) -> None:
        self.hf = tokenizer
        self._spell = functools.lru_cache(KEPT_SPELLINGS)(lambda token, special: self._decode((token,), special))

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.hf, "chat_template", None))

    def serialized(self) -> str | None:
        """The whole tokenizer as the ``tokenizers`` library writes it, without padding and truncation; None for a slow one."""
        backend = getattr(self.hf, "backend_tokenizer", None)
        if backend is None:
            return None
        plain = type(backend).from_str(backend.to_str())
        plain.no_padding()
        plain.no_truncation()
        return str(plain.to_str())

    def encode(self, text: str, *, special_tokens: bool = False) -> tuple[int, ...]:
        """Token ids of raw text, with the special tokens that this tokenizer puts around any text.

        What the text itself spells like a special token, such as ``<|im_start|>``, is text like any other, unless
        ``special_tokens``.
        """
        return self._ids(text, split_special_tokens=not special_tokens)

    def word(self, text: str) -> list[tuple[int, ...]]:
        """Token ids of a word or a special token at the beginning of a text, and after a space."""
        return [self._ids(before + text, add_special_tokens=False, split_special_tokens=False) for before in ("", " ")]

    def chat(
        self, messages: Sequence[Message], *, special_tokens: bool = False, **chat: Unpack[ChatKeywords]
    ) -> tuple[int, ...]:
        """Token ids of a conversation in the model's chat template, up to where its answer begins or goes on.

        Only the template's own special tokens are such; what a message or tool spells like one is text, unless
        ``special_tokens``. UsageError for messages and options that the template does not read or refuses.
        """
        given, tools, options = chat.get("chat_template"), chat.get("tools"), chat.get("template_options") or {}
        own = self._template(given)
        check_options(str(own), tools, options)
        more = {**({} if given is None else {"chat_template": own}), **options}
        in_parts = any(isinstance(m, Mapping) and isinstance(m.get("content"), (list, tuple)) for m in messages)
        talk = normal(messages, str(own), in_parts and self._takes_parts(more))
        wanted = chat.get("continue_final")
        go_on = talk[-1]["role"] == "assistant" if wanted is None else wanted  # as transformers' pipeline has it
        more |= {"continue_final_message": True} if go_on else {}
        spelled = _Spelled(None if special_tokens else self._special)
        more |= {"tools": spelled.renamed(list(tools))} if tools else {}
        ids: list[int] = []
        for part, literal in spelled.parts(self._filled(spelled.renamed(talk), more)):
            ids += self._ids(part, add_special_tokens=False, split_special_tokens=literal)
        return tuple(ids)

    def _template(self, given: Any) -> Any:
        """The template to fill in: the given one (Jinja, a name of the tokenizer's, or a file), else the tokenizer's own."""
        own: Any = getattr(self.hf, "chat_template", None)
        if given is None and not own:
            raise ModelError(
                "this model's tokenizer has no chat template; use raw=True (--raw) and a plain text prompt, or give one with "
                "chat_template=..."
            )
        if given is None or (isinstance(own, dict) and given in own):
            return own if given is None else own[given]
        if isinstance(given, str) and "{" in given:
            return given
        return read_text(Path(given), "chat template")

    def _filled(self, talk: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        failures = list[Exception]()
        for messages in variants(talk):
            try:
                begins = not options.get("continue_final_message", False)
                return str(self.hf.apply_chat_template(messages, add_generation_prompt=begins, tokenize=False, **options))
            except Exception as error:  # templates are programs, and raise what they like
                failures.append(error)
        said = str(failures[0]).partition("Final message to continue")[0].strip().rstrip(".")
        raise UsageError(f"the model's chat template refuses these messages: {said or type(failures[0]).__name__}.")

    def _takes_parts(self, options: Mapping[str, Any]) -> bool:
        """Whether the template itself spells contents that are lists of parts, and does not print them as lists."""
        word = secrets.token_hex(8)
        try:
            text = self._filled([{"role": "user", "content": [{"type": "text", "text": word}]}], options)
        except UsageError:
            return False
        return word in text and f"'{word}'" not in text and f'"{word}"' not in text

    @functools.cached_property
    def _special(self) -> re.Pattern[str] | None:
        """Whatever spells a special token, the longest first; None where there is none."""
        tokens = {str(token) for token in self.hf.added_tokens_decoder.values() if token.special} | {
            *self.hf.all_special_tokens
        }
        longest_first = sorted((token for token in tokens if token), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def _ids(self, text: str, **options: bool) -> tuple[int, ...]:
        try:
            with ENCODING:
                return tuple(self.hf(text, **options)["input_ids"])
        except (TypeError, UnicodeError):
            if (half := re.search("[\ud800-\udfff]", text)) is None:
                raise
            raise UsageError(
                f"the text cannot be tokenized: character {half.start()} is half of a surrogate pair, as bytes give that "
                "are no "
                "UTF-8; decode them with errors='replace'."
            ) from None

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of these ids, its ``special`` tokens left out or spelled."""
        return self._spell(int(ids[0]), special) if len(ids) == 1 else self._decode(ids, special)

    def left_out(self, token: int) -> str:
        """How a special token is spelled, which ``decode`` leaves out; "" for any other token."""
        return "" if self.decode((token,)) else self.decode((token,), special=True)

    def _decode(self, ids: Sequence[int], special: bool) -> str:
        return str(self.hf.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))


class _Spelled:
    """Messages in which everything spelled like a special token has another name, which no template can take for one."""

    def __init__(self, special: re.Pattern[str] | None) -> None:
        self._special, self._name = special, secrets.token_hex(12)
        self._known: list[str] = []

    def renamed(self, value: Any) -> Any:
        """A copy of the value, whatever it is made of."""
        if isinstance(value, str):
            return value if self._special is None else self._special.sub(self._rename, value)
        if isinstance(value, Mapping):
            return {name: self.renamed(item) for name, item in value.items()}
        return [self.renamed(item) for item in value] if isinstance(value, (list, tuple)) else value

    def _rename(self, found: re.Match[str]) -> str:
        self._known.append(found[0])
        return f"{self._name}{len(self._known) - 1}z"

    def parts(self, text: str) -> Iterator[tuple[str, bool]]:
        """The filled-in template with the true names, and whether a part's special tokens are only spelled so.

        Such a part goes from one of the template's own special tokens to the next, where tokenizers cut texts anyway.
        """
        if not self._known or self._special is None or self._name not in text:
            yield text, False
            return
        plain = ""
        for part in self._special.split(text):
            if self._name not in part:
                plain += part
                continue
            if plain:
                yield plain, False
            yield re.sub(f"{self._name}([0-9]+)z", lambda found: self._known[int(found[1])], part), True
            plain = ""
        if plain:
            yield plain, False


class Detokenizer:
    """Text of a growing sequence, piece by piece; the pieces joined are the text of the whole.

    A token may end inside a character, or change how the one before it is spelled. So each piece is the difference of
    two decodings of a short tail, and waits while the tail ends in an unfinished character.
    """

    def __init__(self, tokenizer: Tokenizer | None, special: bool = False) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._ids: list[int] = []
        self._settled = 0  # ids before this one no longer influence new text
        self._given = 0  # ids before this one have been given out
        self._before = ""  # what those between the two spell

    def push(self, token: int) -> str:
        """The text that ``token`` adds, which may be empty until a later token completes it."""
        if self._tokenizer is None:
            return f"{' ' if self._ids else ''}{self._remember(token)}"
        self._remember(token)
        now = self._tokenizer.decode(self._ids[self._settled :], self._special)
        new = now[len(self._before) :]
        if now.endswith(UNFINISHED) or not new:
            return ""
        self._settled, self._given = self._given, len(self._ids)
        self._before = self._tokenizer.decode(self._ids[self._settled :], self._special)
        return new

    def finish(self) -> str:
        """What is still held back, as the tokenizer spells it."""
        if self._tokenizer is None or self._given == len(self._ids):
            return ""
        return self._tokenizer.decode(self._ids[self._settled :], self._special)[len(self._before) :]

    def _remember(self, token: int) -> int:
        self._ids.append(token)
        return token


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """32 hexadecimal digits that say what every token id means: equal for equal vocabularies and added tokens.

    How a text is cut into tokens (merges, normalisation) does not enter. About 0.1 s for 49,152 tokens; keep it.
    """
    ids = tokenizer.hf.get_vocab()
    names = sorted(ids)  # the order of the mapping changes from call to call
    added = sorted((int(i), str(token), bool(token.special)) for i, token in tokenizer.hf.added_tokens_decoder.items())
    stated = json.dumps([names, [ids[name] for name in names], added])
    return hashlib.blake2b(stated.encode(), digest_size=16).hexdigest()
