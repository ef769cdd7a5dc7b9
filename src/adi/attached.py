"""``attach``: the same transformers model, whose ``generate`` is adi's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

from adi.artifact import Exits
from adi.decoding.policies import Policy, Verified, default_policy
from adi.decoding.records import Step
from adi.decoding.sampling import Sampling
from adi.decoding.scheduler import Scheduler
from adi.decoding.session import Session
from adi.errors import UsageError
from adi.model.load import Model, load

# Arguments of transformers' ``generate`` that ask for another way of decoding, or for what is not kept here.
REFUSED = ("assistant_model", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate", "synced_gpus")
# Fields of a generation config with the values at which they mean nothing; another one is refused when tokens are drawn, ...
DRAWN = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None}
# ... and always.
ALWAYS = {"output_scores": False, "output_logits": False, "output_attentions": False, "output_hidden_states": False}
USUAL_LENGTH = 20  # of prompt and answer together, where nothing says more, as in transformers


def attach(model: Any, exits: Exits | Policy | None = None) -> Any:
    """Give a transformers model adi's decoding: ``model.generate(...)`` is called as before and gives the same tokens, sooner.

    It takes what transformers' takes: ids with an attention mask, a generation config and its fields, ``streamer``,
    ``stopping_criteria``, ``logits_processor``, ``prefix_allowed_tokens_fn``; and gives what that gives. What cannot be meant
    (beams, an assistant, scores of every step) is refused by name. Sampling starts from a seed that torch's generator
    draws, so ``torch.manual_seed`` repeats it; the texts are others than transformers' own of that seed.

    Args:
        model: a transformers causal language model.
        exits: trained exits, or a whole policy; by default those shipped for these weights, and n-grams.

    Returns the model itself; ``del model.generate`` undoes it. AdiError for a model that adi cannot run.
    """
    model.generate = MethodType(_generating(model, exits), model)
    return model


def _generating(model: Any, exits: Exits | Policy | None) -> _Generating:
    with _evaluating(model):
        loaded = load(model)
    policy = exits if isinstance(exits, Policy) else default_policy(loaded) if exits is None else Verified(exits)
    policy.check(loaded, False)
    return _Generating(loaded, policy)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Training mode is put aside: a trainer calls ``generate`` in it, and where nothing is dropped it gives the same tokens."""
    from adi.model.hf.splitting import drops

    training = [module for module in getattr(model, "modules", list)() if module.training]
    if not any(map(drops, training)):
        for module in training:
            module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Generating:
    """``generate`` of one attached model."""

    def __init__(self, model: Model, policy: Policy) -> None:
        self.model, self.policy = model, policy

    def __deepcopy__(self, memo: Any) -> _Generating:
        return self

    def is_of(self, model: Any) -> bool:
        """Whether this is the model that was attached, and no copy of it."""
        return model is getattr(self.model.backbone, "model", None)

    def __call__(
        self,
        model: Any,
        inputs: Any = None,
        generation_config: Any = None,
        logits_processor: Sequence[Any] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        prefix_allowed_tokens_fn: Callable[..., Any] | None = None,
        streamer: Any = None,
        **given: Any,
    ) -> Any:
        import torch

        if not self.is_of(model):
            return attach(model, self.policy).generate(
                inputs,
                generation_config,
                logits_processor,
                stopping_criteria,
                prefix_allowed_tokens_fn,
                streamer=streamer,
                **given,
            )
        config, ids, prompts = _config(model, generation_config, given), *_prompts(inputs, given)
        rows = [row for row in range(len(prompts)) for _ in range(config.num_return_sequences or 1)]
        if streamer is not None and len(rows) > 1:
            raise UsageError(f"streamer is given with {len(rows)} texts; a streamer takes one.")
        processors = [*(logits_processor or ()), *_constrained(prefix_allowed_tokens_fn)]
        own, drawn = replace(self.model, generation=config.to_dict(), eos_ids=_ends(config)), _drawn(config)
        length, criteria = _length(config, ids.shape[1], own), _criteria(config, stopping_criteria, given.get("tokenizer"))
        ways = [drawn and replace(drawn, seed=int(torch.randint(0, 2**62, ()))) for _ in rows]
        options: Any = {"max_new_tokens": length, "logits_processor": processors}
        with _evaluating(model):
            sessions = [
                Session(own, prompts[row], self.policy, sampling=way, **options) for row, way in zip(rows, ways, strict=True)
            ]
            texts = self._run(sessions, criteria, streamer)
        pad = config.pad_token_id if config.pad_token_id is not None else min(own.eos_ids, default=0)
        pad = pad[0] if isinstance(pad, (list, tuple)) else pad
        longest = max(map(len, texts))
        new = torch.tensor([text + [pad] * (longest - len(text)) for text in texts], device=ids.device)
        whole = torch.cat([ids[rows], new], -1)
        if not config.return_dict_in_generate:
            return whole
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=whole)

    def _run(self, sessions: Sequence[Session], criteria: Sequence[Any], streamer: Any) -> list[list[int]]:
        """The tokens of all, each up to where a criterion ends it."""
        import torch

        tokens: dict[Session, list[int]] = {session: [] for session in sessions}
        if streamer is not None:
            streamer.put(torch.tensor([sessions[0].prompt_ids]))
        with Scheduler[Session](self.model.backbone) as scheduler:
            for session in sessions:
                scheduler.add(session)
            for session, event in scheduler:
                if not isinstance(event, Step):
                    continue
                tokens[session].append(event.token)
                if streamer is not None:
                    streamer.put(torch.tensor([event.token]))
                text = torch.tensor([[*session.prompt_ids, *tokens[session]]]) if criteria else None
                if any(bool(torch.as_tensor(ends(text, None)).all()) for ends in criteria):
                    scheduler.cancel(session)
        for error in scheduler.failed.values():
            raise error
        if streamer is not None:
            streamer.end()
        return [tokens[session] for session in sessions]


def _config(model: Any, given: Any, options: dict[str, Any]) -> Any:
    """The generation config in force, without what it cannot mean; ``options`` keeps what is none of its fields."""
    import copy

    config = copy.deepcopy(given if given is not None else model.generation_config)
    for name in REFUSED:
        if options.pop(name, None) not in (None, False):
            raise UsageError(f"generate was given {name}, which adi's decoding has no use for; leave it out.")
    fields = {name: options.pop(name) for name in list(options) if hasattr(config, name)}
    config.update(**fields)
    idle = {**ALWAYS, **(DRAWN if config.do_sample else {})}
    asked = {name: value for name in idle if (value := getattr(config, name, None)) not in (None, idle[name])}
    if asked:
        name, value = next(iter(asked.items()))
        raise UsageError(f"generate was given {name}={value!r:.40}, which adi does not do; leave it out.")
    return config


def _prompts(inputs: Any, options: dict[str, Any]) -> tuple[Any, list[tuple[int, ...]]]:
    """The ids as they were given, ``[B, T]``, and each row's without padding."""
    import torch

    ids, mask = options.pop("input_ids", inputs), options.pop("attention_mask", None)
    options.pop("use_cache", None)
    known = {"tokenizer", "past_key_values"}
    if strange := [name for name in options if name not in known or (name != "tokenizer" and options[name] is not None)]:
        raise UsageError(f"generate was given {strange[0]}, which adi's decoding does not read; leave it out.")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise UsageError(f"generate was given {type(ids).__name__} as input_ids; give token ids, a tensor [B, T].")
    rows = ids.tolist()
    kept = [[True] * len(row) for row in rows] if mask is None else mask.bool().tolist()
    return ids, [tuple(i for i, read in zip(row, reads, strict=True) if read) for row, reads in zip(rows, kept, strict=True)]


def _ends(config: Any) -> frozenset[int]:
    ends = config.eos_token_id
    return frozenset(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])


def _drawn(config: Any) -> Sampling | None:
    """How tokens are drawn; None for greedy ones."""
    if not config.do_sample:
        return None
    top_k = config.top_k if config.top_k else None
    given = {"top_p": config.top_p, "min_p": config.min_p}
    rest = {name: value for name, value in given.items() if value is not None}
    return Sampling(temperature=1.0 if config.temperature is None else config.temperature, top_k=top_k, **rest)


def _length(config: Any, prompt: int, model: Model) -> int:
    """How many tokens at most."""
    whole = config.max_length or USUAL_LENGTH
    wanted = whole - prompt if config.max_new_tokens is None else config.max_new_tokens
    context = model.backbone.spec.context
    room = wanted if context is None else min(wanted, context - prompt)
    if room < wanted:
        warnings.warn(f"the context of {context} tokens leaves {room} for the answer, not {wanted}", stacklevel=4)
    if room < 1:
        raise UsageError(f"the prompt has {prompt} tokens and max_length is {config.max_length}; give max_new_tokens.")
    return int(room)


def _constrained(allowed: Callable[..., Any] | None) -> list[Any]:
    if allowed is None:
        return []
    from transformers import PrefixConstrainedLogitsProcessor

    return [PrefixConstrainedLogitsProcessor(allowed, 1)]


def _criteria(config: Any, given: Sequence[Any] | None, tokenizer: Any) -> list[Any]:
    """What ends a text beside its end tokens: the caller's, and those that fields of the config stand for."""
    from transformers import MaxTimeCriteria, StopStringCriteria

    found = list(given or ())
    if config.max_time is not None:
        found.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings is not None:
        if tokenizer is None:
            raise UsageError(f"stop_strings is {config.stop_strings!r:.40}, which needs tokenizer=...")
        found.append(StopStringCriteria(tokenizer, config.stop_strings))
    return found


def custom_generate(*given: Any, model: Any, **options: Any) -> Any:
    """What ``custom_generate/generate.py`` of a model's folder calls: ``generate`` of the model, which is left as it is."""
    for name in ("custom_generate", "trust_remote_code"):
        options.pop(name, None)
    made = vars(model).get("adi_generating")
    if made is None or not made.is_of(model):
        made = model.adi_generating = _generating(model, None)
    return made(model, *given, **options)
