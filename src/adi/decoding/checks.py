"""What a generation refuses before any work."""

from __future__ import annotations

from typing import Any

from adi.decoding.policies import Policy, Reflex
from adi.errors import AdiError
from adi.exits.signals import SIGNALS
from adi.exits.triggers import Trigger
from adi.model.load import Model


def check_count(name: str, value: Any, least: int) -> None:
    """ValueError unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise AdiError(f"{name} is {value!r}; it must be a whole number of at least {least}.")


def check_length(model: Model, prompt: int, new: int) -> None:
    """ValueError where so many tokens are none, or more than the model's context holds."""
    check_count("max_new_tokens", new, 1)
    context = model.backbone.spec.context
    if context is not None and prompt + new > context:
        raise AdiError(
            f"the prompt has {prompt} tokens and max_new_tokens is {new}, together more than the model's context of "
            f"{context}; shorten the prompt to at most {max(context - new, 0)} tokens or lower max_new_tokens."
        )


def check_signals(model: Model, trigger: Trigger) -> None:
    """ValueError where a trigger reads what this model does not show."""
    blind = [n for n in trigger.needs if SIGNALS[n].reads == "mlp"]
    if blind and not model.backbone.has_mlp_tap:
        raise AdiError(
            f"the trigger reads {blind[0]!r}, but {model.backbone.spec.family} models show no single MLP per block "
            "(experts, or another form); use entropy, margin, top_probability or stability."
        )


def check_reflex(model: Model, policy: Policy, sampled: bool) -> None:
    """ValueError where a reflex relies on a certificate of another model or precision or of greedy text where it is not, or on
    what the engine cannot do."""
    if not isinstance(policy, Reflex):
        return
    if sampled and policy.certificate is not None:
        raise AdiError(
            "a certificate of risk speaks of greedy text, and this one is to be sampled: leave temperature and "
            "repetition_penalty out, or risk=... (thresholds=... are uncertified and go with both)."
        )
    if policy.certificate is not None:
        policy.certificate.check(model.backbone.spec)
    if policy.skipped == "propagate" and not model.backbone.can_propagate:
        raise AdiError(
            f"the {model.backbone.spec.backend} engine cannot make keys and values from an exit's state: use skipped='exact', "
            "or the engine 'hf'."
        )
