"""Which processor this is, as far as the system knows, and returning freed memory to it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import platform
from pathlib import Path

VECTORS = {"avx512_vnni": "AVX-512 VNNI", "avx512f": "AVX-512", "avx_vnni": "AVX2 VNNI", "avx2": "AVX2"}


def processor() -> str:
    """The processor's own name."""
    return next(iter(_cpuinfo("model name")), platform.processor())


def vectors() -> str | None:
    """The widest vector instructions: kernels and ratios of speed depend on these, and a name such as "AMD EPYC" does not tell
    them. None where the system does not."""
    flags = set(" ".join(_cpuinfo("flags")[:1]).split())
    return next((name for flag, name in VECTORS.items() if flag in flags), None)


def processor_hash(more: str = "") -> str:
    """A short name for a processor with exactly these abilities, and whatever else counts."""
    found = sorted({*_cpuinfo("model name"), *_cpuinfo("flags"), *_cpuinfo("Features")})
    text = repr([platform.processor(), platform.machine(), found, more])
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def give_back_memory() -> None:
    """Have the C library return freed memory to the system, where it can (glibc); after something large was built."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def _cpuinfo(what: str) -> tuple[str, ...]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    return tuple(line.partition(":")[2].strip() for line in lines if line.startswith(what))
