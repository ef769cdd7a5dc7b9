"""``adi serve``: answer many clients by OpenAI's protocol, with a page to chat on."""

from __future__ import annotations

import importlib.util
import signal
import socket
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from adi.cli.shared.options import DecodingOptions, EngineOptions, ModelArgument, option
from adi.cli.shared.output import err, say
from adi.clusters import join_cluster, require_ray
from adi.errors import UsageError

if TYPE_CHECKING:
    from adi.serve.app import ServerOptions

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")  # the last as clients name it
PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
SPOT_CHECK = 0.05
BACKLOG = 2048


@dataclass(frozen=True)
class PlaceOptions:
    """Where the server listens and who may ask it."""

    host: Annotated[str, option("--host", help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1"
    port: Annotated[int, option("--port", "-p", min=0, max=65535, help="Port to listen on; 0: any that is free.")] = 8000
    api_key: Annotated[
        list[str] | None,
        option("--api-key", envvar="ADI_API_KEY", help="Ask clients for this key; may be repeated.", show_default=False),
    ] = None
    cors_origin: Annotated[
        list[str] | None, option("--cors-origin", help="Let pages of this origin ask; may be repeated.", rare=True)
    ] = None
    allowed_host: Annotated[
        list[str] | None, option("--allowed-host", help="A further name of this server; may be repeated.", rare=True)
    ] = None

    def settings(self) -> dict[str, Any]:
        """Fields of ``ServerOptions``."""
        if "" in (self.api_key or ()):
            raise UsageError(f"--api-key is {''!r}, which anybody has; give a text of at least one character.")
        hosts = (*(LOOPBACK if self.host in LOOPBACK else ()), *(self.allowed_host or ()))
        return {"keys": tuple(self.api_key or ()), "origins": tuple(self.cors_origin or ()), "hosts": hosts}


@dataclass(frozen=True)
class LoadOptions:
    """How much the server takes on."""

    most: Annotated[int, option("--most", min=1, help="Answers that run at once.")] = 32
    queue: Annotated[int, option("--queue", min=0, help="Answers that may wait for a place; beyond it clients get 429.")] = 128
    time_limit: Annotated[float, option("--time-limit", min=0.1, help="Seconds that a request may take.")] = 600
    body_limit: Annotated[float, option("--body-limit", min=0.001, help="MiB that a request's body may have.", rare=True)] = 4
    ray: Annotated[
        str | None, option("--ray", metavar="ADDRESS", help="Run replicas on this Ray cluster; local: one on this machine.")
    ] = None
    replicas: Annotated[str, option("--replicas", help="With --ray: how many replicas, 2, or 1:4 by load.")] = "1"

    def settings(self) -> dict[str, Any]:
        """Fields of ``ServerOptions``."""
        body = round(self.body_limit * (1 << 20))
        return {"most": self.most, "queue": self.queue, "seconds": self.time_limit, "body_bytes": body}


def serve(
    model: ModelArgument = "smollm2-135m",
    name: Annotated[
        list[str] | None, option("--name", help="What clients call the model; may be repeated. By default MODEL.")
    ] = None,
    temperature: Annotated[
        float, option("--temperature", "-t", min=0, max=2, help="Of requests that give none; 1 is OpenAI's default.")
    ] = 1.0,
    *,
    place: PlaceOptions,
    load: LoadOptions,
    decoding: DecodingOptions,
    engine: EngineOptions,
) -> None:
    """Serve a model: OpenAI's chat and text completions, metrics, a page to chat on. Ctrl-C or SIGTERM finishes what runs."""
    if absent := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UsageError(f"adi serve needs {absent[0]}: pip install 'adi-lm[serve]'.")
    from adi.serve.app import ServerOptions

    options = ServerOptions(
        names=tuple(name or [Path(model).name if Path(model).exists() else model]),
        temperature=temperature,
        spot_check=decoding.spot_check or SPOT_CHECK,
        **place.settings(),
        **load.settings(),
    )
    if load.ray is None and load.replicas != "1":
        raise UsageError(f"--replicas {load.replicas} is for a Ray cluster: give --ray ADDRESS, or leave it out.")
    if load.ray is not None:
        where = (place.host, place.port)
        _run_cluster(load.ray, load.replicas, where, partial(_loaded, decoding, engine, model), options)
        return
    with _bound(place.host, place.port) as bound:
        _run(*_loaded(decoding, engine, model), options, bound)


def _bound(host: str, port: int) -> socket.socket:
    """A socket at this address, which nobody can connect to yet."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise UsageError(f"--host {host} --port {port} cannot be listened on: {error.strerror}; choose others.") from None
    return made


def _loaded(decoding: DecodingOptions, engine: EngineOptions, source: str) -> tuple[Any, Any]:
    """Model and policy, compiled and measured, so that the first client does not wait for it."""
    import adi.decoding.sampler  # noqa: F401  with torch, which requests that sample need

    model, policy = decoding.load(engine, source)
    policy.prepare(model)
    model.backbone.prepare((), drafts=True, wait=True)
    return model, policy


def _run_cluster(address: str, replicas: str, place: tuple[str, int], loading: Any, options: ServerOptions) -> None:
    """Until a signal, replicas on a Ray cluster."""
    require_ray(address)
    import ray
    from ray import serve as ray_serve

    from adi.serve.cluster import ClusterOptions, application

    cluster = ClusterOptions.of(replicas)
    join_cluster(address)
    stopped = threading.Event()
    before = {one: signal.signal(one, lambda *_: stopped.set()) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray_serve.start(http_options={"host": place[0], "port": place[1]})
        ray_serve.run(application(loading, options, cluster), name="adi")
        say(
            err(),
            f"Serving {', '.join(options.names)} at http://{place[0]}:{place[1]} on Ray, replicas: {replicas}; Ctrl-C stops.",
        )
        stopped.wait()
    finally:
        ray_serve.delete("adi")
        ray.shutdown()
        for one, handler in before.items():
            signal.signal(one, handler)


def _run(model: Any, policy: Any, options: ServerOptions, place: socket.socket) -> None:
    """Until a signal; what runs is finished, for as long as a request may take. A bug that ended the engine is raised."""
    import uvicorn

    from adi.serve.app import Server

    def stop() -> None:
        running.should_exit = True

    server = Server(model, policy, options, on_failure=stop)
    patience = round(options.seconds) + 1
    quiet: Any = {"log_level": "warning", "access_log": False, "server_header": False}
    running = uvicorn.Server(uvicorn.Config(server.app, lifespan="on", timeout_graceful_shutdown=patience, **quiet))
    place.listen(BACKLOG)  # who comes from now on is answered
    host, port = place.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    say(err(), f"Serving {', '.join(options.names)} at http://{shown}:{port} (API under /v1); Ctrl-C stops.")
    before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        running.run(sockets=[place])  # uvicorn raises the signal again at its end, for the handlers that were there
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    if server.engine.failure is not None:
        raise server.engine.failure
