"""``adi serve --ray``: replicas of the server on a Ray cluster, behind one address.

A front takes each request, and a router sends those that begin alike to the same replica, which has the KV memory of their
beginning. Ray starts, watches and restarts replicas, and adds some while requests queue.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from adi.arguments import several
from adi.decoding.policies import Policy, default_policy
from adi.errors import UsageError
from adi.model.load import Model, load
from adi.serve.app import Json, Server, ServerOptions
from adi.serve.errors import ApiError
from adi.serve.limits import Limits

PREFIX = 512  # characters of a text that tell where it goes
TRIES = 3  # replicas that a request may meet: one that died before it answered costs a start anew
HEADERS_OF_A_HOP = ("content-length", "transfer-encoding", "connection")
PASSED_ON = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
Loading = Callable[[], tuple[Model, Policy]]


@dataclass(frozen=True)
class ClusterOptions:
    """``least`` to ``most`` replicas, by how many requests wait, each with so many processor cores, ``cpus``."""

    least: int = 1
    most: int = 1
    cpus: float = 1.0

    @classmethod
    def of(cls, replicas: str, cpus: float = 1.0) -> ClusterOptions:
        """From "2", or "1:4" for one to four; UsageError for others."""
        least, colon, most = replicas.partition(":")
        if not (least.isdecimal() and (most.isdecimal() or not colon) and 0 < int(least) <= int(most or least)):
            raise UsageError(f"replicas is {replicas!r:.40}; give a number such as 2, or a range such as 1:4.")
        return cls(int(least), int(most or least), cpus)


def key_of(body: bytes) -> str:
    """What requests that begin alike share: a conversation up to the user's first message, or the beginning of a prompt; empty
    where there is neither."""
    with suppress(ValueError, TypeError, KeyError, IndexError, AttributeError):
        asked = json.loads(body)
        if "messages" not in asked:
            return str(asked["prompt"])[:PREFIX]
        users = [i for i, message in enumerate(asked["messages"]) if message["role"] == "user"]
        return json.dumps(asked["messages"][: users[0] + 1])[:PREFIX]
    return ""


def in_order(key: str, replicas: Sequence[str]) -> list[str]:
    """Replicas as this key prefers them, by rendezvous hashing (Thaler and Ravishankar 1998): where one goes or comes, only its
    own keys move."""
    return sorted(replicas, key=lambda name: hashlib.blake2b(f"{key}\0{name}".encode()).digest())


class PrefixRouter(RequestRouter):
    """Sends a request to the replica that its key prefers, or where that one is full to the next."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in ranks; within a rank Ray takes the one with the shortest queue."""
        key = pending_request.kwargs.get("key") if pending_request is not None else None
        if not key:
            return [candidate_replicas]
        named = {one.replica_id.unique_id: one for one in candidate_replicas}
        return [[named[name]] for name in in_order(key, list(named))]


class Replica:
    """A server without a socket: its application, asked by calls."""

    def __init__(self, loading: Loading, options: ServerOptions) -> None:
        model, policy = loading()
        self._server = Server(model, policy, options)
        self._started = False

    async def check_health(self) -> None:
        """Raises what ended the engine, for Ray to restart the replica."""
        if self._server.engine.failure is not None:
            raise self._server.engine.failure

    async def ask(self, scope: dict[str, Any], body: bytes, key: str = "") -> AsyncIterator[Any]:
        """Status and headers of the response, then its body in pieces. ``key`` is for the router."""
        if not self._started:
            self._started = True
            self._server.engine.start()
        sent, given = asyncio.Queue[Mapping[str, Any] | None](), [dict[str, Any](type="http.request", body=body)]

        async def receive() -> MutableMapping[str, Any]:
            return given.pop() if given else await asyncio.Future[MutableMapping[str, Any]]()

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.put_nowait(message)

        work = asyncio.ensure_future(self._server.app(scope, receive, send))
        work.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                if message["type"] == "http.response.start":
                    yield message["status"], list(message.get("headers", ()))
                else:
                    yield message.get("body", b"")
        finally:  # also where the client is gone
            work.cancel()


class Front:
    """Takes requests for all replicas."""

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas.options(stream=True)

    async def pass_on(self, request: Request) -> Response:
        """The response of a replica; where it dies before it answers, that of another."""
        scope, body = {name: request.scope[name] for name in PASSED_ON if name in request.scope}, await request.body()
        for _ in range(TRIES):
            answer = self._replicas.ask.remote(scope, body, key=key_of(body))
            try:
                status, headers = await anext(answer)
            except RayActorError:
                continue
            except BackPressureError:
                said = "all replicas are full; try again in a moment."
                return _told(ApiError(429, said, "rate_limit_error", code="queue_full", headers={"Retry-After": "10"}))
            response = StreamingResponse(_rest(answer), status)
            response.raw_headers = [pair for pair in headers if pair[0].decode().lower() not in HEADERS_OF_A_HOP]
            return response
        said = f"{TRIES} replicas ended before they answered; try again."
        return _told(ApiError(503, said, "server_error", headers={"Retry-After": "10"}))


async def _rest(answer: Any) -> AsyncIterator[bytes]:
    """The body; a replica that dies in the middle of a stream is told in it."""
    try:
        async for piece in answer:
            yield piece
    except RayActorError:
        error = ApiError(503, "the replica ended before the answer did; try again.", "server_error")
        yield b"data: " + json.dumps(error.body()).encode() + b"\n\n"
    finally:
        answer.cancel()


def _told(error: ApiError) -> Response:
    return Json(error.body(), error.status_code, error.headers)


def application(loading: Loading, options: ServerOptions, cluster: ClusterOptions) -> Any:
    """The Ray Serve application: a front, and the replicas behind it, each of which calls ``loading`` for its model."""
    number: dict[str, Any] = {"num_replicas": cluster.least}
    if cluster.most > cluster.least:
        scaling = {"min_replicas": cluster.least, "max_replicas": cluster.most, "target_ongoing_requests": options.most}
        number = {"autoscaling_config": scaling}
    replicas: Any = serve.deployment(
        Replica,
        name="replica",
        max_ongoing_requests=options.most,
        max_queued_requests=options.queue,
        graceful_shutdown_timeout_s=options.seconds,
        ray_actor_options={"num_cpus": cluster.cpus},
        request_router_config={"request_router_class": "adi.serve.cluster.PrefixRouter"},
        **number,
    )
    front: Any = serve.deployment(
        serve.ingress(lambda: _front_app(options.body_bytes))(Front),
        name="front",
        max_ongoing_requests=cluster.most * (options.most + options.queue),
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(replicas.bind(loading, options))


def _front_app(most_bytes: int) -> Any:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Limits, most_bytes=most_bytes, keys=())

    async def pass_on(request: Request) -> Response:
        front: Any = serve.get_replica_context().servable_object
        response: Response = await front.pass_on(request)
        return response

    app.add_api_route("/{path:path}", pass_on, methods=["GET", "POST", "OPTIONS"], response_model=None)
    return app


def app(args: Mapping[str, Any]) -> Any:
    """For ``serve deploy``: the application of a configuration file's ``args`` (examples/serve/ray.yaml).

    Raises UsageError for names that it does not know.
    """
    known = {"model", "precision", "exits", "replicas", "cpus", "most", "queue", "temperature", "keys"}
    if unknown := sorted(set(args) - known):
        raise UsageError(f"args has {unknown[0]!r:.40}, which is none of {', '.join(sorted(known))}; leave it out.")
    model = str(args.get("model", "smollm2-135m"))
    more = {name: args[name] for name in ("most", "queue", "temperature") if name in args}
    keys = several(args.get("keys"))
    if wrong := [key for key in keys if not isinstance(key, str) or not key]:
        raise UsageError(f"keys has {wrong[0]!r:.40}; give texts of at least one character.")
    options = ServerOptions(names=(model,), keys=keys, **more)
    cluster = ClusterOptions.of(str(args.get("replicas", 1)), float(args.get("cpus", 1)))
    return application(_Loading(model, args.get("precision", "auto"), args.get("exits")), options, cluster)


@dataclass(frozen=True)
class _Loading:
    """Loads the model where a replica runs."""

    model: str
    precision: str
    exits: str | None

    def __call__(self) -> tuple[Model, Policy]:
        from adi.artifact import load_exits
        from adi.decoding.policies import Verified

        model = load(self.model, precision=self.precision)
        return model, default_policy(model) if self.exits is None else Verified(load_exits(self.exits))
