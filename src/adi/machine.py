"""Which processor this is, as far as the system knows, and returning freed memory to it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

M_MMAP_THRESHOLD = -3  # malloc.h
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


def give_back_at_once() -> None:
    """From now on have the C library (glibc) return large blocks as soon as they are freed, instead of keeping them for later;
    before much is calculated once with large arrays."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def energy_meter(powercap: Path = Path("/sys/class/powercap")) -> Callable[[], float | None]:
    """A function that gives the joules which processors, their memory and GPUs have used since now, whoever used them; None
    where this machine tells none: by RAPL's counters, which need rights to be read, or NVML's, which need ``pynvml``."""
    begun = _joules(powercap)

    def since() -> float | None:
        now = _joules(powercap)
        spent = [(now[name][0] - was) % turnover for name, (was, turnover) in begun.items() if name in now]
        return sum(spent) if spent else None

    return since


def _joules(powercap: Path) -> Mapping[str, tuple[float, float]]:
    """Each counter, and the value at which it begins again."""
    found = {}
    for zone in sorted(powercap.glob("intel-rapl:*")):  # AMD's too
        with contextlib.suppress(OSError, ValueError):
            if (zone / "name").read_text().startswith(("package", "dram")):  # a package's cores are counted in it
                now, most = (float((zone / file).read_text()) for file in ("energy_uj", "max_energy_range_uj"))
                found[zone.name] = now / 1e6, most / 1e6
    with contextlib.suppress(ImportError):
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            for i in range(pynvml.nvmlDeviceGetCount()):
                used = pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(i))
                found[f"gpu {i}"] = used / 1e3, float(1 << 63)
    return found


@functools.cache
def _cpuinfo(what: str) -> tuple[str, ...]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    return tuple(line.partition(":")[2].strip() for line in lines if line.startswith(what))
