"""Joining a Ray cluster."""

from __future__ import annotations

import importlib.util
import logging
import os

from adi.errors import UsageError

SECONDS = 10  # in which a cluster should answer; Ray itself tries for ten minutes


def require_ray(address: str) -> None:
    """UsageError where ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError(f"--ray {address} needs ray: pip install 'adi-lm[ray]'.")


def require_answer(address: str) -> None:
    """UsageError where nobody at this host and port speaks Ray's protocol, gRPC."""
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(address.rpartition("/")[2]) as channel:
        try:
            grpc.channel_ready_future(channel).result(SECONDS)
        except grpc.FutureTimeoutError:
            said = f"--ray {address} cannot be reached: no Ray answers within {SECONDS} s; give an address, auto or local."
            raise UsageError(said) from None


def join_cluster(address: str) -> None:
    """Join the Ray cluster at this address; "auto" is the one that this machine is part of, "local" a new one on it alone.

    Raises UsageError where it cannot be reached, or where ray is not installed.
    """
    require_ray(address)
    import ray

    if ":" in address and not os.environ.get("RAY_USE_TLS"):
        require_answer(address)
    try:
        ray.init(address=None if address == "local" else address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        raise UsageError(f"--ray {address} cannot be reached ({str(error)[:80]!r}); give an address, auto or local.") from None
