"""Text to token ids and back, one token at a time."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, str]
Prompt = str | Sequence[Message] | Sequence[int]
UNFINISHED = "\ufffd"
KEPT_SPELLINGS = 65_536  # of lone tokens: drafts and texts under way ask for the same ones again and again


class Tokenizer:
    """A transformers tokenizer behind the few things that adi needs of one."""

    def __init__(self, tokenizer: Any) -> None:
        self.hf = tokenizer
        self._spell = functools.lru_cache(KEPT_SPELLINGS)(lambda token: self._decode((token,)))

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.hf, "chat_template", None))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of raw text, with the special tokens that this tokenizer puts around any text."""
        try:
            return tuple(self.hf(text)["input_ids"])
        except (TypeError, UnicodeError) as error:  # half a surrogate pair, for example
            raise ValueError(f"the text cannot be tokenized: {error}.") from None

    def chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a conversation in the model's chat template, up to where its answer begins.

        ValueError without a template, and for messages that lack ``role`` or ``content``.
        """
        if not self.has_chat_template:
            raise ValueError("this model's tokenizer has no chat template; use raw=True (--raw) and a plain text prompt.")
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise ValueError(f"a message needs 'role' and 'content', got {message!r}.")
        try:
            text = self.hf.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are programs, and raise what they like
            raise ValueError(f"the model's chat template refuses these messages: {error}") from None
        return tuple(self.hf(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        if len(ids) == 1:
            return self._spell(int(ids[0]))
        return self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Detokenizer:
    """Text of a growing sequence, piece by piece; the pieces joined are the text of the whole.

    A token may end inside a character, or change how the one before it is spelled. So each piece is the difference of
    two decodings of a short tail, and waits while the tail ends in an unfinished character.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._settled = 0  # ids before this one no longer influence new text
        self._given = 0  # ids before this one have been given out
        self._before = ""  # what those between the two spell

    def push(self, token: int) -> str:
        """The text that ``token`` adds, which may be empty until a later token completes it."""
        if self._tokenizer is None:
            return f"{' ' if self._ids else ''}{self._remember(token)}"
        self._remember(token)
        now = self._tokenizer.decode(self._ids[self._settled :])
        new = now[len(self._before) :]
        if now.endswith(UNFINISHED) or not new:
            return ""
        self._settled, self._given = self._given, len(self._ids)
        self._before = self._tokenizer.decode(self._ids[self._settled :])
        return new

    def finish(self) -> str:
        """What is still held back, as the tokenizer spells it."""
        if self._tokenizer is None or self._given == len(self._ids):
            return ""
        return self._tokenizer.decode(self._ids[self._settled :])[len(self._before) :]

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
