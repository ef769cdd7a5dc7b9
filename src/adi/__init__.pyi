"""The public names and the modules that have them: for type checkers, and for ``__init__.py``, which imports them on use."""

from adi.artifact import Exits as Exits
from adi.artifact import bare_exits as bare_exits
from adi.artifact import load_exits as load_exits
from adi.decoding.looped.solve import Solved as Solved, solve as solve
from adi.decoding.generate import BatchMemoryError as BatchMemoryError
from adi.decoding.generate import generate as generate
from adi.decoding.generate import generate_batch as generate_batch
from adi.decoding.generate import stream as stream
from adi.decoding.policies import FullDepth as FullDepth
from adi.decoding.policies import Lookup as Lookup
from adi.decoding.policies import Policy as Policy
from adi.decoding.policies import Reflex as Reflex
from adi.decoding.policies import Static as Static
from adi.decoding.policies import Verified as Verified
from adi.decoding.records import Generation as Generation
from adi.decoding.records import Step as Step
from adi.decoding.sampling import Sampling as Sampling
from adi.decoding.sampling import prompt_seed as prompt_seed
from adi.decoding.scheduler import Scheduler as Scheduler
from adi.decoding.session import Session as Session
from adi.exits.triggers import AllOf as AllOf
from adi.exits.triggers import Always as Always
from adi.exits.triggers import AnyOf as AnyOf
from adi.exits.triggers import Never as Never
from adi.exits.triggers import Threshold as Threshold
from adi.exits.triggers import Trigger as Trigger
from adi.exits.triggers import Weighted as Weighted
from adi.measure.audit.run import audit as audit
from adi.measure.calibration.calibrate import Calibration as Calibration
from adi.measure.calibration.calibrate import calibrate as calibrate
from adi.measure.inspect import inspect as inspect
from adi.measure.trace import Trace as Trace
from adi.measure.trace import read_trace as read_trace
from adi.measure.trace import trace_of as trace_of
from adi.measure.trace import write_trace as write_trace
from adi.measure.trace_page import plot as plot
from adi.measure.trigger_study.study import study_triggers as study_triggers
from adi.model.backbone import Backbone as Backbone
from adi.model.load import Model as Model
from adi.model.load import load as load
from adi.risk.certificate import Certificate as Certificate
from adi.risk.drift import DriftMonitor as DriftMonitor
from adi.training.tune import TuneOptions as TuneOptions
from adi.training.tune import tune as tune

__version__: str
