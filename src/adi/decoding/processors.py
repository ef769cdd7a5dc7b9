"""What changes logits before a token is chosen: transformers' own logits processors, penalties, and a caller's functions.

All of it is a function of the token ids so far, applied where full depth has its word; so drafting stays exact.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from adi.arguments import several, whole
from adi.decoding.sampling import Sampling
from adi.errors import ModelError, UsageError
from adi.model.generation_config import changing
from adi.model.load import Model

if TYPE_CHECKING:
    from torch import Tensor

LogitsProcessor = Callable[..., Any]  # token ids [1, T] and scores [1, V] to scores; as transformers has it
KEPT_GRAMMARS = 64  # of a model, compiled
COMPILING = threading.Lock()
OWN_NAMES = ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")


def fields_for(model: Model, sampling: Sampling) -> dict[str, Any]:
    """What changes greedy text, by the names of a generation config: the model's own, and what is asked for in its place."""
    fields = dict(model.generation)
    fields |= {name: value for name in OWN_NAMES if (value := getattr(sampling, name)) is not None}
    if sampling.repetition_penalty is not None:
        fields["repetition_penalty"] = float(sampling.repetition_penalty)
    if sampling.bad_words:
        words = [ids for word in sampling.bad_words for ids in _spellings(model, word)]
        fields["bad_words_ids"] = [*(fields.get("bad_words_ids") or ()), *words]
    if sampling.logit_bias:
        biases = fields.get("sequence_bias") or []
        pairs = [[list(ids), bias] for ids, bias in biases.items()] if isinstance(biases, Mapping) else list(biases)
        given = {int(i) if str(i).isdecimal() else i: float(bias) for i, bias in sampling.logit_bias.items()}  # JSON's keys too
        token_ids("logit_bias", given, model)
        fields["sequence_bias"] = [*pairs, *([[i], bias] for i, bias in given.items())]
    return changing(fields)


def _spellings(model: Model, word: str | Sequence[int]) -> list[list[int]]:
    """A bad word as token ids: at the beginning of a text, and after a space."""
    if not isinstance(word, str):
        token_ids("bad_words", word, model)
        return [list(word)]
    if model.tokenizer is None:
        raise UsageError("this model has no tokenizer; give bad_words as token ids, or adi.load(model, tokenizer=...).")
    return [list(ids) for ids in model.tokenizer.word(word.strip())]


def token_ids(name: str, given: Any, model: Model) -> frozenset[int]:
    """Ids of the vocabulary; UsageError for anything else."""
    vocabulary = model.backbone.spec.vocabulary
    return frozenset(whole(f"a token of {name}", i, 0, vocabulary - 1) for i in several(given))


def logits_processors(
    model: Model, fields: Mapping[str, Any], prompt: Sequence[int], budget: int, own: Sequence[LogitsProcessor]
) -> list[LogitsProcessor]:
    """The processors of these fields, as transformers' ``generate`` makes them for this prompt, in its order; then ``own``."""
    if not fields:
        return list(own)
    import torch
    from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList

    spec = model.backbone.spec
    text = SimpleNamespace(is_encoder_decoder=False, get_text_config=lambda: SimpleNamespace(vocab_size=spec.vocabulary))
    decoder = type("Decoder", (GenerationMixin,), {"config": text})()
    try:
        config: Any = GenerationConfig(**fields)
        config.max_length = len(prompt) + budget
        if config.min_new_tokens is not None:
            config.min_length = len(prompt) + config.min_new_tokens
        config._eos_token_tensor = torch.tensor(sorted(model.eos_ids), device=spec.device) if model.eos_ids else None
        ids = torch.tensor([list(prompt)], device=spec.device)
        return decoder._get_logits_processor(  # type: ignore[no-any-return]
            config, len(prompt), ids, logits_processor=LogitsProcessorList(own), device=spec.device
        )
    except (ValueError, TypeError) as error:
        raise ModelError(f"transformers cannot read {dict(fields)} as a generation config: {error}") from None


def penalties(sampling: Sampling, prompt: int) -> list[LogitsProcessor]:
    """Frequency and presence penalties, where there are some, over what follows a prompt of so many tokens."""
    often, ever = sampling.frequency_penalty, sampling.presence_penalty

    def penalised(ids: Tensor, scores: Tensor) -> Tensor:
        counts = ids[0, prompt:].bincount(minlength=scores.shape[-1]).to(scores.dtype)
        return scores - often * counts - ever * (counts > 0)

    return [penalised] if often or ever else []


def processed(processors: Sequence[LogitsProcessor], text: Sequence[int], scores_V: Tensor) -> Tensor:
    """Scores of the token after ``text``, ``[V]`` in float32; UsageError for a processor that gives no scores."""
    import torch

    ids, scores = torch.tensor([list(text)], device=scores_V.device), scores_V.detach()[None].to(torch.float32, copy=True)
    for processor in processors:
        shape, scores = scores.shape, processor(ids, scores)
        if not isinstance(scores, torch.Tensor) or scores.shape != shape:
            what = f"a tensor {list(scores.shape)}" if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise UsageError(f"the logits processor {processor!r} gave {what}; it must give scores, {list(shape)}.")
    return scores[0]


class Constraint:
    """A form that a text has, by a grammar that llguidance compiled for a model's tokenizer.

    It masks the rule that judges drafts, so that drafting stays exact: every token is what full depth gives under the mask.
    """

    def __init__(self, tokens: Any, grammar: str, name: str) -> None:
        from llguidance import LLMatcher

        self._matcher, self._name = LLMatcher(tokens, grammar, log_level=0), name
        self._require_sound(self._matcher)

    def processor(self, prompt: int) -> LogitsProcessor:
        """What rules out all that the grammar does not allow, over what follows a prompt of so many tokens."""
        import torch

        matcher, read = self._matcher.deep_copy(), prompt

        def masked(ids: Tensor, scores: Tensor) -> Tensor:
            nonlocal read
            matcher.consume_tokens(ids[0, read:].tolist())
            read = ids.shape[1]
            allowed_V = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)
            self._require_sound(matcher)
            return scores.masked_fill(allowed_V.to(scores.device) == 0, -torch.inf)

        return masked

    def _require_sound(self, matcher: Any) -> None:
        if matcher.is_error():
            raise UsageError(f"{self._name}: {matcher.get_error().splitlines()[0].rstrip('.')}.")


def constraint(model: Model, response_format: Mapping[str, Any] | None, grammar: str | None) -> Constraint | None:
    """The form asked for, in OpenAI's ``response_format`` or as a Lark ``grammar``, None for any text; compiled once for a
    model. AdiError for one that has no meaning, and for a model whose tokenizer or end tokens do not allow it."""
    compiled = _grammar(response_format, grammar)
    if compiled is None:
        return None
    with COMPILING:
        known: dict[str, Constraint] = model.notes.setdefault("grammars", {})
        if compiled not in known:
            made = Constraint(_grammar_tokens(model), compiled, "response_format" if grammar is None else "grammar")
            if len(known) == KEPT_GRAMMARS:
                del known[next(iter(known))]
            known[compiled] = made
        return known[compiled]


def _grammar(response_format: Mapping[str, Any] | None, grammar: str | None) -> str | None:
    """In llguidance's form. JSON is spelled as ``json.dumps`` does, so that no text is spent on spaces without end."""
    if response_format is not None and not isinstance(response_format, Mapping):
        raise UsageError(f"response_format is {response_format!r:.60}; give an object such as {{'type': 'json_object'}}.")
    given = dict(response_format or {"type": "text"})
    if given.get("type") not in ("text", "json_object", "json_schema"):
        raise UsageError(f"response_format is of type {given.get('type')!r:.60}; choose text, json_object or json_schema.")
    if grammar is not None and (not isinstance(grammar, str) or given["type"] != "text"):
        raise UsageError(f"grammar is {grammar!r:.60}, response_format {given['type']}; give a Lark grammar, or the other.")
    if given["type"] == "text" and grammar is None:
        return None
    try:
        from llguidance import LLMatcher
    except ImportError:
        said = "grammar" if grammar is not None else f"response_format {given['type']}"
        raise UsageError(f"{said} needs llguidance: pip install 'adi-lm[grammar]'.") from None
    if grammar is not None:
        return str(LLMatcher.grammar_from_lark(grammar))
    stated = {"schema": {"type": "object"}} if given["type"] == "json_object" else given.get("json_schema")
    schema = stated.get("schema") if isinstance(stated, Mapping) else None
    if not isinstance(schema, (Mapping, bool)):
        raise UsageError(f"response_format has the json_schema {stated!r:.60}; it needs 'schema', an object.")
    spaces: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=spaces))


def _grammar_tokens(model: Model) -> Any:
    """The model's tokenizer as llguidance reads it, made once: a second for 50,000 tokens."""
    if "grammar tokens" not in model.notes:
        from llguidance import LLTokenizer

        text = None if model.tokenizer is None else model.tokenizer.serialized()
        if text is None:
            raise ModelError(f"{model.source or 'this model'} has no fast tokenizer, which a grammar needs.")
        if not model.eos_ids:
            raise ModelError(f"{model.source or 'this model'} states no end token, with which a grammar's text ends.")
        vocabulary = model.backbone.spec.vocabulary
        try:
            model.notes["grammar tokens"] = LLTokenizer(text, n_vocab=vocabulary, eos_token=sorted(model.eos_ids))
        except ValueError as error:
            raise ModelError(f"llguidance cannot read the tokenizer of {model.source or 'this model'}: {error}") from None
    return model.notes["grammar tokens"]
