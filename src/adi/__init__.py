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

# The public names, by the module that has them, which is imported at their first use.
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
    "adi.measure.trace_page": ("plot",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = list(_HOME)

if TYPE_CHECKING:  # the same once more, for type checkers
    # isort: off
    from adi.decoding.scheduler import Scheduler as Scheduler
    from adi.decoding.policies import (
        FullDepth as FullDepth,
        Lookup as Lookup,
        Policy as Policy,
        Reflex as Reflex,
        Static as Static,
        Verified as Verified,
    )
    from adi.decoding.records import Generation as Generation, Step as Step
    from adi.decoding.sampling import Sampling as Sampling, prompt_seed as prompt_seed
    from adi.decoding.session import Session as Session
    from adi.decoding.generate import (
        BatchMemoryError as BatchMemoryError,
        generate as generate,
        generate_batch as generate_batch,
        stream as stream,
    )
    from adi.artifact import Exits as Exits, bare_exits as bare_exits, load_exits as load_exits
    from adi.risk.certificate import Certificate as Certificate
    from adi.risk.drift import DriftMonitor as DriftMonitor
    from adi.exits.triggers import (
        AllOf as AllOf,
        Always as Always,
        AnyOf as AnyOf,
        Never as Never,
        Threshold as Threshold,
        Trigger as Trigger,
        Weighted as Weighted,
    )
    from adi.measure.audit.run import audit as audit
    from adi.measure.calibration.calibrate import Calibration as Calibration, calibrate as calibrate
    from adi.measure.inspect import inspect as inspect
    from adi.measure.trigger_study.study import study_triggers as study_triggers
    from adi.measure.trace import Trace as Trace, read_trace as read_trace, trace_of as trace_of, write_trace as write_trace
    from adi.model.backbone import Backbone as Backbone
    from adi.model.load import Model as Model, load as load
    from adi.training.tune import TuneOptions as TuneOptions, tune as tune
    from adi.measure.trace_page import plot as plot


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'adi' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
