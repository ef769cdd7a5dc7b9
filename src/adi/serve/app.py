"""The server: routes, and what all requests have in common."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Receive, Scope, Send

import adi
from adi.decoding.policies import Policy
from adi.decoding.scheduler import MOST
from adi.measure.pages import render
from adi.model.load import Model
from adi.serve.answers import ChatCompletions, Completions, TextCompletions
from adi.serve.asking import Asked, Policies, Reading
from adi.serve.errors import ApiError, invalid
from adi.serve.jobs import Engine, Job
from adi.serve.limits import Limits, as_json
from adi.serve.metrics import Metrics
from adi.serve.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from adi.serve.scores import spelled

CLIENT_GONE = 499  # which nobody reads


@dataclass(frozen=True)
class ServerOptions:
    """How a server behaves. ``names`` are the model's for clients, ``most`` answers run at once and ``queue`` more wait, each
    request for ``seconds`` at most. ``hosts``: the names by which it may be asked (all, where there are none), which keeps
    pages of other names off a server of this machine's. ``temperature``: of requests that give none."""

    names: tuple[str, ...]
    most: int = MOST
    queue: int = 128
    seconds: float = 600.0
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    body_bytes: int = 4 << 20
    temperature: float = 1.0
    spot_check: float = 0.05


class Server:
    """One model behind the protocol; ``app`` is the ASGI application. ``on_failure`` is called where a bug ended the engine."""

    def __init__(
        self, model: Model, policy: Policy, options: ServerOptions, on_failure: Callable[[], None] = lambda: None
    ) -> None:
        self.model, self.options = model, options
        spec = model.backbone.spec
        self.metrics = Metrics(options.names[0], spec)
        self.policies = Policies(model, policy, options.spot_check)
        self.reading = Reading(model, self.policies, options.names, options.temperature)
        self.engine = Engine(
            model.backbone, most=options.most, queue=options.queue, on_part=self.metrics.saw, on_failure=on_failure
        )
        self.draining = False
        self._since = int(time.time())
        self.metrics.gauge("num_requests_running", "Sequences that passes run for.", lambda: self.engine.running)
        waiting = "Sequences that wait for a place or for KV memory."
        self.metrics.gauge("num_requests_waiting", waiting, lambda: max(0, self.engine.open - self.engine.running))
        if (pool := getattr(model.backbone, "pool", None)) is not None:
            share = lambda: 1 - pool.free / pool.capacity if pool.capacity else 0.0  # noqa: E731
            self.metrics.gauge("kv_cache_usage_perc", "Share of KV memory in use.", share)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.engine.start()
        yield
        self.draining = True
        await run_in_threadpool(self.engine.stop)

    @cached_property
    def app(self) -> FastAPI:
        """The application."""
        app = FastAPI(title="adi", version=adi.__version__, lifespan=self._lifespan, redoc_url=None, docs_url=None)
        told = {"description": "Why not.", "content": {"application/json": {"schema": ERROR}}}
        errors: dict[int | str, Any] = {"default": told}
        streamed = {**errors, 200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
        post, get = app.post, partial(app.get, responses=errors)
        post("/v1/chat/completions", responses=streamed)(self.chat)
        post("/v1/completions", responses=streamed)(self.completion)
        post("/tokenize", responses=errors)(self.tokenize)
        get("/v1/models")(self.models)
        get("/health")(self.health)
        get("/ready")(self.ready)
        get("/metrics")(self.show_metrics)
        get("/", response_class=HTMLResponse)(self.page)
        app.add_exception_handler(ApiError, self._refused)
        app.add_exception_handler(RequestValidationError, self._refused)
        app.add_exception_handler(HTTPException, self._refused)
        app.add_exception_handler(Exception, self._refused)
        app.add_middleware(Limits, most_bytes=self.options.body_bytes, keys=self.options.keys)
        if self.options.origins:
            app.add_middleware(CORSMiddleware, allow_origins=self.options.origins, allow_methods=["*"], allow_headers=["*"])
        if self.options.hosts:
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(self.options.hosts))
        return app

    async def _refused(self, request: Request, error: Exception) -> Response:
        """Any error in OpenAI's shape; a bug shows as itself in the log."""
        if isinstance(error, RequestValidationError):
            error = invalid(error.errors())
        elif isinstance(error, HTTPException) and not isinstance(error, ApiError):
            error = ApiError(
                error.status_code, f"{request.method} {request.url.path:.80}: {error.detail}.", headers=error.headers
            )
        elif not isinstance(error, ApiError):
            error = ApiError(500, f"a bug of the server's: {type(error).__name__}.", "server_error")
        self.metrics.refused(error.status_code)
        return Json(error.body(), error.status_code, error.headers)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """The next message of a conversation."""
        return await self._answered(request, body, self.reading.chat, ChatCompletions)

    async def completion(self, body: CompletionRequest, request: Request) -> Response:
        """How texts go on."""
        return await self._answered(request, body, self.reading.completion, TextCompletions)

    async def _answered(self, request: Request, body: Any, read: Callable[[Any], Asked], kind: type[Completions]) -> Response:
        self._require_ready()
        asked = await run_in_threadpool(read, body)
        job = await self.engine.submit(asked.sequences, asked.count, self.options.seconds)
        options = body.stream_options
        answers = kind(asked, job, body.model or self.options.names[0], options is not None and options.include_usage)
        if body.stream:
            return Stream(job, answers.stream())
        with job:
            return await _unless_gone(request, answers.whole())

    def _require_ready(self) -> None:
        if self.draining:
            raise ApiError(503, "the server is being stopped.", "server_error", headers={"Retry-After": "10"})

    async def tokenize(self, body: TokenizeRequest) -> Response:
        """Token ids, as vLLM has it."""
        ids = await run_in_threadpool(self.reading.tokens, body)
        found: dict[str, Any] = {"count": len(ids), "max_model_len": self.model.backbone.spec.context, "tokens": ids}
        if body.return_token_strs:
            found["token_strs"] = [spelled(self.model, [i]) for i in ids]
        return Json(found)

    async def models(self) -> Response:
        """What there is: one model under its names."""
        spec = self.model.backbone.spec
        known = {"layers": spec.layers, "precision": spec.numbers, "backend": spec.backend}
        known |= {"mode": self.policies.usual.mode, "depths": self.policies.usual.depths}
        known["risks"] = [{"kind": kind, "level": level} for kind, level in self.policies.levels]
        known["priced"] = await run_in_threadpool(lambda: self.policies.knows_prices)
        more = {"object": "model", "created": self._since, "owned_by": "adi", "max_model_len": spec.context, "adi": known}
        return Json({"object": "list", "data": [{"id": name, **more} for name in self.options.names]})

    async def health(self) -> Response:
        """200 while the engine runs."""
        return Json({"status": "ok"}) if self.engine.failure is None else Json({"status": "failed"}, 503)

    async def ready(self) -> Response:
        """200 while requests are taken."""
        taking = self.engine.failure is None and not self.draining
        return Json({"status": "ready" if taking else "stopping"}, 200 if taking else 503)

    async def show_metrics(self) -> Response:
        """For Prometheus."""
        for kind, level in self.policies.levels:
            self.metrics.certificate(kind, level, self.policies.reflexes.get((kind, level)))
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self) -> Response:
        """A chat that shows how each token came."""
        tokenizer = self.model.tokenizer
        form = "ids" if tokenizer is None else "chat" if tokenizer.has_chat_template else "text"
        data = {"layers": self.model.backbone.spec.layers, "form": form, "key": bool(self.options.keys)}
        return HTMLResponse(render("serve.html", title=self.options.names[0], data=data))


ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


class Json(Response):
    """A JSON response."""

    media_type = "application/json"

    def __init__(self, value: Any, status_code: int = 200, headers: Any = None) -> None:
        super().__init__(as_json(value), status_code, headers)


class Stream(StreamingResponse):
    """Server-sent events of a job, which ends with the response, however that ends."""

    def __init__(self, job: Job, events: AsyncIterator[bytes]) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._job:
            await super().__call__(scope, receive, send)


async def _unless_gone(request: Request, answer: Awaitable[Any]) -> Response:
    """The answer; where the client goes away before it is there, the work on it ends."""
    work, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return Json(work.result()) if work.done() else Response(status_code=CLIENT_GONE)
    finally:
        for task in (work, gone):
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
