"""``python -m adi.lm_eval``: EleutherAI's lm-evaluation-harness with the model class ``adi``; all else is its own command line.

``python -m adi.lm_eval run --model adi --model_args pretrained=smollm2-135m,precision=int8 --tasks arc_easy``
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from adi.artifact import load_exits
from adi.decoding.generate import generate_batch
from adi.decoding.policies import FullDepth, Lookup, Policy, Verified, default_policy
from adi.decoding.sampling import Sampling
from adi.decoding.teacher_forcing import KnownText, forced_pass, full_logits
from adi.errors import UsageError
from adi.model.load import load

MOST = 16  # texts that are generated together
USUAL_LENGTH = 256


@register_model("adi")
class AdiLM(TemplateLM):  # type: ignore[misc]
    """A model that adi runs: log-likelihoods by teacher forcing, texts by speculative decoding with full depth's output.

    ``pretrained`` is a model as ``adi.load`` takes it, or one already loaded; ``mode`` verified, full or lookup; ``exits`` a
    folder of trained exits.
    """

    def __init__(
        self,
        pretrained: Any,
        exits: str | None = None,
        mode: str = "verified",
        backend: str = "auto",
        precision: str = "auto",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = USUAL_LENGTH,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        loaded = not isinstance(pretrained, str)
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "auto"  # the harness's own command line says cuda:0 where nobody chose
        self.model = pretrained if loaded else load(pretrained, backend=backend, precision=precision, device=device)
        if self.model.tokenizer is None:
            raise UsageError(f"pretrained is {pretrained!r:.60}, which has no tokenizer; lm_eval gives texts.")
        ways: dict[str, Policy] = {"full": FullDepth(), "lookup": Lookup(), "verified": default_policy(self.model)}
        if mode not in ways:
            raise UsageError(f"mode is {mode!r}; choose one of {', '.join(ways)}.")
        self.policy = Verified(load_exits(exits)) if exits is not None else ways[mode]
        self.tokenizer = self.model.tokenizer.hf
        self.most = batch_size if isinstance(batch_size, int) and batch_size > 1 else MOST
        self.max_gen_toks = max_gen_toks
        self.max_length = max_length or self.model.backbone.spec.context or 2048

    @property
    def eot_token_id(self) -> int:
        """What ends a text, and stands before one that has no context."""
        return min(self.model.eos_ids)

    @property
    def tokenizer_name(self) -> str:
        """For caches of requests."""
        return str(self.model.source).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
        """Token ids, without special tokens around them unless they are asked for."""
        return list(self.tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as a text."""
        more = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **more))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **more: Any) -> list[tuple[float, bool]]:
        texts = []
        for _, context, continuation in requests:
            ids = [*context, *continuation][-self.max_length - 1 :]
            texts.append((ids, len(ids) - len(continuation)))
        known = [KnownText(tuple(ids[:-1]), start - 1) for ids, start in texts]
        found = []
        for (ids, start), forced in zip(texts, forced_pass(self.model.backbone, known), strict=True):
            total, greedy, at = 0.0, True, start
            for logits_RV in full_logits(self.model.backbone, forced.deep_ND):
                logs_RV = logits_RV.float().log_softmax(-1)
                for logs_V in logs_RV:
                    total += float(logs_V[ids[at]])
                    greedy = greedy and int(logs_V.argmax()) == ids[at]
                    at += 1
            found.append((total, greedy))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the context."""
        found = []
        for (text,) in (request.args for request in requests):
            ids, start, most = self.tok_encode(text), self.prefix_token_id, self.max_length
            windows = get_rolling_token_windows(token_list=ids, prefix_token=start, max_seq_len=most, context_len=1)
            pairs = [(None, *pair) for pair in map(make_disjoint_window, windows)]
            found.append(sum(log for log, _ in self._loglikelihood_tokens(pairs)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts, those of the same options together."""
        alike = defaultdict[str, list[int]](list)
        for i, request in enumerate(requests):
            alike[repr(sorted(request.args[1].items(), key=str))].append(i)
        texts: list[str] = [""] * len(requests)
        for places in alike.values():
            options = dict(requests[places[0]].args[1])
            until = [one for one in handle_stop_sequences(options.pop("until", None), eos=None) if one]
            length = int(options.pop("max_gen_toks", options.pop("max_tokens", self.max_gen_toks)))
            if length >= self.max_length:
                raise UsageError(
                    f"the task asks for {length} tokens, and max_length is {self.max_length}, which leaves no room for a "
                    "prompt; lower max_gen_toks."
                )
            drawn, temperature = options.pop("do_sample", False), float(options.pop("temperature", 0.0))
            given: Any = {**options, "temperature": temperature} if drawn and temperature > 0 else {}
            if strange := [name for name in given if name not in Sampling.__dataclass_fields__]:
                raise UsageError(f"the task asks for {strange[0]}={given[strange[0]]!r:.40}, which adi does not do.")
            prompts = [self.tok_encode(requests[i].args[0])[-(self.max_length - length) :] for i in places]
            made = generate_batch(self.model, prompts, self.policy, most=self.most, max_new_tokens=length, stop=until, **given)
            for i, one in zip(places, made, strict=True):
                texts[i] = one.text
        return texts


def main() -> None:
    """The harness's own command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
