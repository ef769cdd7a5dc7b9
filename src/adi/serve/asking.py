"""From a request's body to the sequences that answer it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from adi.artifact import Exits, bare_exits
from adi.decoding.policies import FullDepth, Lookup, Policy, Reflex
from adi.decoding.processors import constraint
from adi.decoding.sampling import SEEDS, Sampling
from adi.errors import AdiError
from adi.model.load import Model, looped_network
from adi.risk.free_energy import FULL_PRICE
from adi.serve.errors import ApiError, refused
from adi.serve.jobs import Answer, ServedSequence
from adi.serve.protocol import AdiFields, Answering, ChatRequest, CompletionRequest, TokenizeRequest
from adi.serve.scores import Scores, spelled
from adi.serve.tool_calls import BEGIN, calls_grammar

COMPLETION_TOKENS = 16  # where a completion says no length, as in OpenAI's API
TRACED_CANDIDATES = 5
KEPT_PRICES = 16


@dataclass(frozen=True)
class Asked:
    """A request as it was understood: for each prompt, ``n`` answers. ``scored``: log-probabilities of the prompts too, with so
    many candidates. ``echo`` are the texts that come before the answers."""

    model: Model
    prompts: Sequence[tuple[int, ...]]
    n: int
    sampling: Sampling
    policy: Policy
    options: dict[str, Any]
    logprobs: int | None = None
    scored: int | None = None
    echo: Sequence[str] | None = None
    parses_calls: bool = False
    trace: bool = False

    @property
    def answers(self) -> int:
        """How many answers there will be."""
        return 0 if self.options["max_new_tokens"] == 0 else self.n * len(self.prompts)

    @property
    def count(self) -> int:
        """How many sequences."""
        return self.answers + (0 if self.scored is None else len(self.prompts))

    def sequences(self) -> list[ServedSequence]:
        """The answers, then the scores of the prompts. Each answer has the text that it would have alone: of one prompt's
        answers each draws as in ``adi.generate(..., n=n)``."""
        made = list[ServedSequence]()
        for ids in self.prompts if self.answers else ():
            sampling = self.sampling.settled()
            ways = [sampling] if self.n == 1 else [sampling.of_prompt(i) for i in range(self.n)]
            made += [Answer(self.model, ids, self.policy, sampling=way, **self.options) for way in ways]
        scored = () if self.scored is None else self.prompts
        return [*made, *(Scores(self.model, ids, self.scored or 0) for ids in scored)]


@dataclass
class Policies:
    """The ways of decoding that a server offers; ``usual`` where a request says nothing. Each certified level has one policy,
    whose drift monitor sees all its answers. Used by several threads."""

    model: Model
    usual: Policy
    spot_check: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    reflexes: dict[tuple[str, float], Reflex] = field(default_factory=dict)
    priced: dict[float, Reflex] = field(default_factory=dict)

    def __post_init__(self) -> None:
        usual = self.usual
        if isinstance(usual, Reflex) and usual.risk is not None and usual.monitor is not None:
            self.reflexes[usual.kind, usual.risk] = usual

    @property
    def exits(self) -> Exits | None:
        """The exits in use."""
        return getattr(self.usual, "exits", None)

    @property
    def levels(self) -> list[tuple[str, float]]:
        """The certified levels of these exits for this model."""
        spec = self.model.backbone.spec
        mine = [c for c in (self.exits.certificates if self.exits else ()) if c.precision == spec.numbers]
        return sorted({(c.kind, c.level) for c in mine if c.skipped == "exact" and c.fingerprint == spec.fingerprint})

    @property
    def knows_prices(self) -> bool:
        """Whether depth can be asked for by its price."""
        network = looped_network(self.model) if self.model.backbone.spec.loop is not None else None
        return network is not None and bool(network.config.gate_price)

    def of(self, asked: AdiFields) -> Policy:
        """What a request asks for; ApiError for what means nothing here."""
        mode = asked.mode or ("reflex" if asked.risk is not None else None)
        if asked.risk is not None and mode != "reflex":
            raise ApiError(400, f"adi.risk is {asked.risk:g}, which means nothing in {mode} mode.", param="adi.risk")
        if mode == "reflex":
            with self.lock:
                return self._reflex(asked)
        return {None: self.usual, "full": FullDepth(), "lookup": Lookup(), "verified": self._verified()}[mode]

    def _verified(self) -> Policy:
        from adi.decoding.policies import Verified

        return self.usual if isinstance(self.usual, Verified) else Verified(self.exits)

    def _reflex(self, asked: AdiFields) -> Policy:
        if asked.risk is None and asked.price is None:
            if isinstance(self.usual, Reflex):
                return self.usual
            raise ApiError(400, "adi.mode is 'reflex', which needs adi.risk or adi.price.", param="adi.mode")
        try:
            if asked.risk is None:
                assert asked.price is not None
                return self._priced(asked.price)
            if self.exits is None:
                raise ApiError(400, f"adi.risk is {asked.risk:g}, but this server has no exits.", param="adi.risk")
            key = (asked.kind, asked.risk)
            if key not in self.reflexes:
                self.reflexes[key] = Reflex(self.exits, risk=asked.risk, kind=asked.kind, spot_check=self.spot_check)
            return self.reflexes[key]
        except AdiError as error:
            raise refused(error, "adi.price" if asked.risk is None else "adi.risk") from None

    def _priced(self, price: float) -> Reflex:
        if price not in self.priced:
            exits = bare_exits(self.model, price=price)
            if len(self.priced) == KEPT_PRICES:
                del self.priced[next(iter(self.priced))]
            self.priced[price] = Reflex(exits, trigger=exits.trigger)
        return self.priced[price]


@dataclass(frozen=True)
class Reading:
    """Understands bodies, for one model under some names. ``temperature`` is that of requests that give none."""

    model: Model
    policies: Policies
    names: tuple[str, ...]
    temperature: float = 1.0

    def chat(self, body: ChatRequest) -> Asked:
        """A conversation; ApiError for what the model cannot do."""
        if body.top_logprobs is not None and not body.logprobs:
            said = f"top_logprobs is {body.top_logprobs}, which needs logprobs: true."
            raise ApiError(400, said, param="top_logprobs")
        lengths = {length for length in (body.max_tokens, body.max_completion_tokens) if length is not None}
        if len(lengths) == 2 or 0 in lengths:
            said = f"max_tokens is {body.max_tokens} and max_completion_tokens {body.max_completion_tokens}; give one, above 0."
            raise ApiError(400, said, param="max_completion_tokens")
        ids = self.encoded_chat(body)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        calls, grammar = bool(body.tools) and body.tool_choice != "none" and BEGIN in self._template, self._calls_grammar(body)
        return self._asked(body, [ids], next(iter(lengths), None), logprobs, grammar=grammar, parses_calls=calls)

    def _calls_grammar(self, body: ChatRequest) -> str | None:
        """The form of an answer that must call a tool; the caller's own grammar where it need not."""
        choice = body.tool_choice
        if isinstance(choice, str) and choice != "required":
            if not body.parallel_tool_calls:
                said = "parallel_tool_calls is false, which is kept to where tool_choice is 'required' or a function."
                raise ApiError(400, said, param="parallel_tool_calls")
            return body.grammar
        said = choice if isinstance(choice, str) else choice.function.name
        functions = [tool["function"] for tool in body.tools or () if _is_function(tool)]
        if not isinstance(choice, str):
            functions = [one for one in functions if one["name"] == said]
        if not functions:
            raise ApiError(400, f"tool_choice is {said!r:.60}, which is none of the functions in tools.", param="tool_choice")
        if BEGIN not in self._template:
            form = f"the model's chat template spells calls in another form than {BEGIN}"
            raise ApiError(400, f"tool_choice is {said!r:.60}, but {form}; leave it at 'auto'.", param="tool_choice")
        if body.grammar is not None or (body.response_format is not None and body.response_format.type != "text"):
            raise ApiError(400, f"tool_choice is {said!r:.60}, and an answer has one form; leave one out.", param="tool_choice")
        return calls_grammar(functions, body.parallel_tool_calls and isinstance(choice, str))

    def completion(self, body: CompletionRequest) -> Asked:
        """Texts or token ids to go on with."""
        if body.best_of not in (None, body.n):
            said = f"best_of is {body.best_of}; adi gives every answer that it makes: leave it out, or give n, {body.n}."
            raise ApiError(400, said, param="best_of")
        length = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        if length == 0 and not body.echo:
            raise ApiError(
                400, f"max_tokens is {length}, so nothing is to be done; echo: true gives the prompt.", param="max_tokens"
            )
        if length == 0 and body.stream:
            raise ApiError(400, f"max_tokens is {length} with stream; the prompt alone comes whole only.", param="stream")
        given = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        prompts: list[Any] = [given] if given and isinstance(given[0], int) else given
        if not prompts:
            raise ApiError(400, "prompt is []; give at least one.", param="prompt")
        ids = [self._encoded("prompt", one, raw=isinstance(one, str)) for one in prompts]
        echo = [one if isinstance(one, str) else spelled(self.model, one) for one in prompts] if body.echo else None
        scored = body.logprobs if body.echo else None
        if body.stream and scored is not None:
            said = f"logprobs is {body.logprobs} with echo and stream; the log-probabilities of a prompt come whole only."
            raise ApiError(400, said, param="logprobs")
        return self._asked(body, ids, length, body.logprobs, body.grammar, echo=echo, scored=scored)

    def tokens(self, body: TokenizeRequest) -> tuple[int, ...]:
        """The token ids of a text or a conversation."""
        self.named(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, f"prompt is {body.prompt!r:.40}; give either prompt or messages.", param="prompt")
        return self.encoded_chat(body) if body.prompt is None else self._encoded("prompt", body.prompt, raw=True)

    def named(self, name: str | None) -> None:
        """ApiError for another model."""
        if name is not None and name not in self.names:
            said = f"there is no model {name!r:.80} here; this server has {', '.join(self.names)}."
            raise ApiError(404, said, param="model", code="model_not_found")

    def encoded_chat(self, body: ChatRequest | TokenizeRequest) -> tuple[int, ...]:
        """Token ids of the conversation in the chat template."""
        shown = body.tools if getattr(body, "tool_choice", "auto") != "none" else None
        messages = [message.model_dump(exclude_unset=True) for message in body.messages or ()]
        return self._encoded("messages", messages, tools=shown or None, template_options=body.chat_template_kwargs)

    @property
    def _template(self) -> str:
        return str(getattr(getattr(self.model.tokenizer, "hf", None), "chat_template", ""))

    def _encoded(self, param: str, prompt: Any, **reading: Any) -> tuple[int, ...]:
        try:
            return self.model.encode(prompt, **reading)
        except AdiError as error:
            raise refused(error, param) from None

    def _asked(
        self,
        body: Answering,
        prompts: list[tuple[int, ...]],
        length: int | None,
        logprobs: int | None,
        grammar: str | None,
        **more: Any,
    ) -> Asked:
        self.named(body.model)
        if body.stream_options is not None and not body.stream:
            said = f"stream_options is {body.stream_options!r:.60}, and stream is false; leave it out."
            raise ApiError(400, said, param="stream_options")
        traced = body.adi.trace and not body.stream
        shape = {} if body.response_format is None else {"response_format": body.response_format.model_dump(by_alias=True)}
        options: dict[str, Any] = {
            "max_new_tokens": length,
            "stop": body.stop,
            "stop_token_ids": body.stop_token_ids,
            "stop_at_eos": not body.ignore_eos,
            "skip_special_tokens": body.skip_special_tokens,
            "logprobs": max(logprobs or 0, TRACED_CANDIDATES) if traced else logprobs,
            "price": FULL_PRICE if traced and body.adi.price is None else body.adi.price,
            **shape,
            "grammar": grammar,
        }
        policy, sampling = self.policies.of(body.adi), self._sampling(body)
        try:  # compiled here and not in the engine's thread, which would hold up all others
            constraint(self.model, shape.get("response_format"), grammar)
        except AdiError as error:
            raise refused(error) from None
        return Asked(self.model, prompts, body.n, sampling, policy, options, logprobs, trace=body.adi.trace, **more)

    def _sampling(self, body: Answering) -> Sampling:
        """How tokens are drawn; at temperature 0, what cuts the distribution leaves the likeliest token as it is."""
        temperature = self.temperature if body.temperature is None else body.temperature
        cuts: dict[str, Any] = {"top_k": body.top_k if body.top_k > 0 else None, "top_p": body.top_p, "min_p": body.min_p}
        try:
            return Sampling(
                temperature=temperature,
                seed=None if body.seed is None else body.seed % SEEDS,
                repetition_penalty=body.repetition_penalty,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                min_new_tokens=body.min_tokens,
                logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()} or None,
                **(cuts if temperature > 0 else {}),
            )
        except AdiError as error:
            raise refused(error) from None


def _is_function(tool: dict[str, Any]) -> bool:
    function = tool.get("function")
    return isinstance(function, dict) and isinstance(function.get("name"), str)
