"""adi: adaptive depth inference for decoder language models.

>>> import adi
>>> model = adi.load("smollm2-135m")
>>> exits = adi.load_exits("smollm2-135m")
>>> print(adi.generate(model, "Why is the sky blue?", policy=adi.Verified(exits)))

Importing this loads neither torch nor transformers; the first verb does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adi.artifact import Exits, bare_exits, load_exits
    from adi.decoding.generate import BatchMemoryError, generate, generate_batch, stream
    from adi.decoding.policies import FullDepth, Lookup, Policy, Reflex, Static, Verified
    from adi.decoding.records import Generation, Step
    from adi.decoding.sampling import Sampling, prompt_seed
    from adi.decoding.scheduler import Scheduler
    from adi.decoding.session import Session
    from adi.exits.triggers import AllOf, Always, AnyOf, Never, Threshold, Trigger, Weighted
    from adi.measure.audit.run import audit
    from adi.measure.calibration.calibrate import Calibration, calibrate
    from adi.measure.inspect import inspect
    from adi.measure.trace import Trace, read_trace, trace_of, write_trace
    from adi.measure.trace_page import write_page as plot
    from adi.measure.trigger_study.study import study_triggers
    from adi.model.backbone import Backbone
    from adi.model.load import Model, load
    from adi.risk.certificate import Certificate
    from adi.risk.drift import DriftMonitor
    from adi.training.tune import TuneOptions, tune

_HOMES = {
    "adi.decoding.scheduler": ("Scheduler",),
    "adi.decoding.policies": ("FullDepth", "Lookup", "Policy", "Reflex", "Static", "Verified"),
    "adi.decoding.records": ("Generation", "Step"),
    "adi.decoding.sampling": ("Sampling", "prompt_seed"),
    "adi.decoding.session": ("Session",),
    "adi.decoding.generate": ("BatchMemoryError", "generate", "generate_batch", "stream"),
    "adi.artifact": ("Exits", "bare_exits", "load_exits"),
    "adi.risk.certificate": ("Certificate",),
    "adi.risk.drift": ("DriftMonitor",),
    "adi.exits.triggers": ("AllOf", "Always", "AnyOf", "Never", "Threshold", "Trigger", "Weighted"),
    "adi.measure.audit.run": ("audit",),
    "adi.measure.calibration.calibrate": ("Calibration", "calibrate"),
    "adi.measure.inspect": ("inspect",),
    "adi.measure.trigger_study.study": ("study_triggers",),
    "adi.measure.trace": ("Trace", "read_trace", "trace_of", "write_trace"),
    "adi.model.backbone": ("Backbone",),
    "adi.model.load": ("Model", "load"),
    "adi.training.tune": ("TuneOptions", "tune"),
}
_WHERE = {name: (home, name) for home, names in _HOMES.items() for name in names}
_WHERE["plot"] = ("adi.measure.trace_page", "write_page")

__all__ = [  # noqa: RUF022 - the verbs first
    "load",
    "load_exits",
    "bare_exits",
    "generate",
    "generate_batch",
    "stream",
    "prompt_seed",
    "inspect",
    "audit",
    "tune",
    "calibrate",
    "study_triggers",
    "trace_of",
    "read_trace",
    "write_trace",
    "plot",
    "AllOf",
    "Always",
    "AnyOf",
    "Backbone",
    "BatchMemoryError",
    "Calibration",
    "Certificate",
    "DriftMonitor",
    "Exits",
    "FullDepth",
    "Generation",
    "Lookup",
    "Model",
    "Never",
    "Policy",
    "Reflex",
    "Sampling",
    "Scheduler",
    "Session",
    "Static",
    "Step",
    "Threshold",
    "Trace",
    "Trigger",
    "TuneOptions",
    "Verified",
    "Weighted",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'adi' has no attribute {name!r}")
    home, attribute = _WHERE[name]
    return getattr(import_module(home), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
