"""A server of ``adi serve`` in this process, at a free port of this machine's."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

import adi
from adi.decoding.policies import Policy, default_policy
from adi.serve.app import Server, ServerOptions


class Running:
    """A server that runs: where, and what it is made of."""

    def __init__(self, server: Server, port: int) -> None:
        self.server, self.port = server, port
        self.url = f"http://127.0.0.1:{port}"

    def settled(self, seconds: float = 20.0) -> bool:
        """Whether nothing is open within so many seconds, of which those count that this process runs."""
        for _ in range(int(100 * seconds)):
            if not self.server.engine.open and not self.server.engine._owners:
                break
            time.sleep(0.01)
        return not self.server.engine.open and not self.server.engine._owners

    def client(self, **more: Any) -> Any:
        """OpenAI's own client of it."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60, **more})


@contextmanager
def serving(model: adi.Model, policy: Policy | None = None, **options: Any) -> Iterator[Running]:
    """Serve a model under the name "tiny"."""
    server = Server(model, policy or default_policy(model), ServerOptions(**{"names": ("tiny",), **options}))
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        quiet: Any = {"log_level": "error", "lifespan": "on", "timeout_graceful_shutdown": 30}
        running = uvicorn.Server(uvicorn.Config(server.app, **quiet))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        while not running.started and thread.is_alive():
            time.sleep(0.005)
        try:
            yield Running(server, place.getsockname()[1])
        finally:
            running.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server did not stop"
    assert server.engine.failure is None, repr(server.engine.failure)
