"""Joining a Ray cluster."""

from __future__ import annotations

import importlib.util
import socket

from adi.errors import UsageError


def require_ray(address: str) -> None:
    """UsageError where ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError(f"--ray {address} needs ray: pip install 'adi-lm[ray]'.")


def join_cluster(address: str) -> None:
    """Join the Ray cluster at this address; "auto" is the one that this machine is part of, "local" a new one on it alone.

    Raises UsageError where it cannot be reached, or where ray is not installed.
    """
    require_ray(address)
    import ray

    try:
        if ":" in address:  # Ray itself tries for ten minutes
            node, _, port = address.rpartition("/")[2].rpartition(":")
            socket.create_connection((node, int(port)), 10).close()
        ray.init(address=None if address == "local" else address, log_to_driver=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"--ray {address} cannot be reached ({str(error)[:80]!r}); give an address, auto or local.") from None
