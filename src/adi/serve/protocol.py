"""The bodies of requests, as OpenAI's API and vLLM's additions to it have them.

A parameter that is not here is refused by its name. One whose only allowed value is what adi does anyway is here for clients
that send it always.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_ANSWERS, MOST_LOGPROBS, MOST_STOPS = 128, 20, 16
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Whole = Annotated[int, Field(ge=0, lt=1 << 31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Body(BaseModel):
    """An object of a request: what it does not know is refused, null means left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {k: _whole(v) for k, v in given.items() if v is not None} if isinstance(given, dict) else given


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 5.0 is a whole one."""
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class ChatMessage(Body):
    """A message; what else it holds, such as ``tool_calls``, the chat template reads."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Annotated[str, Field(min_length=1)]
    content: str | list[dict[str, Any]] | None = None


Messages = Annotated[list[ChatMessage], Field(min_length=1)]


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchema(Body):
    """The schema that an answer follows."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What form the answer has: any text, any JSON object, JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class AdiFields(Body):
    """What is adi's own. ``mode``: how to decode, by default as the server was started. ``price``, nats for a full pass: tells
    every token's free energy and, in reflex mode of a looped model whose gate knows prices, sets the price. ``risk``: a
    certified level, in reflex mode; ``kind`` of it. ``trace``: every depth and candidate; in a stream, every event."""

    mode: Literal["verified", "full", "lookup", "reflex"] | None = None
    price: Annotated[float, Field(ge=0)] | None = None
    risk: Annotated[float, Field(ge=0)] | None = None
    kind: Literal["disagreement", "log_loss"] = "disagreement"
    trace: bool = False


class Answering(Body):
    """What both kinds of completion take."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: list[TokenId] = []
    max_tokens: Whole | None = None
    min_tokens: Whole | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    grammar: str | None = None
    adi: AdiFields = AdiFields()
    user: str | None = None
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"


class FunctionName(Body):
    """One of the tools."""

    name: str


class NamedTool(Body):
    """The tool that the answer calls."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(Answering):
    """``/v1/chat/completions``."""

    messages: Messages
    max_completion_tokens: Whole | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionRequest(Answering):
    """``/v1/completions``."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None


class TokenizeRequest(Body):
    """``/tokenize``: a text, or messages in the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False
