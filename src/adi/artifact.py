"""``Exits``: exit heads, trigger, drafter and all that was trained for one model, saved beside its fingerprint.

A saved folder holds ``exits.json`` and ``exits.safetensors``; loading runs no code.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
from msgspec import Meta

from adi.arguments import instance
from adi.drafters.datastore import Datastore
from adi.drafters.network import Drafter, Drafting, shapes
from adi.errors import AdiError, FileError, ModelError, UsageError
from adi.exits.heads import Adapter, ExitHead, Heads
from adi.exits.probe import Net, Probe, gate_probe, network_shapes
from adi.exits.signals import Prediction
from adi.exits.triggers import Rule, Threshold, Trigger
from adi.files import expanded, package_data, read_json, require_file, whole_file, write_json
from adi.model.arrays import as_array, as_tensor, digest
from adi.model.backbone import Backbone, Spec, States
from adi.model.load import Model, looped_network
from adi.risk.certificate import Certificate, find
from adi.schema import Positive, Record, Share, from_json

if TYPE_CHECKING:
    from torch import Tensor

SHIPPED = package_data("exits")
JSON, TENSORS = "exits.json", "exits.safetensors"
MOST_TENSOR_BYTES = 8 << 30
BARE_TRIGGER = Threshold("top_probability", 0.5)
FLOATS = (np.float16, np.float32, np.float64)
INT32 = ("ids_S", "ids_N", "lengths_M")  # token ids and counts; other arrays hold weights
Reader = Callable[[int, "States | Tensor"], Prediction]
Arrays = dict[str, Any]


class _Document(Record, frozen=True, omit_defaults=True):
    """What exits.json holds. Format 3 is format 2 with certificates; format 1 knew no drafter."""

    format: Literal[1, 2, 3]
    base: str
    base_name: str
    layers: Positive
    width: Positive
    vocabulary: Positive
    depths: Annotated[tuple[Positive, ...], Meta(min_length=1)]
    report: dict[str, Any]
    made_by: dict[str, Any]
    trigger: Rule
    tensors: str  # digest of the other file
    certificates: tuple[Certificate, ...] = ()

    def __post_init__(self) -> None:
        if list(self.depths) != sorted({*self.depths}) or self.depths[-1] >= self.layers:
            raise FileError(f"depths {list(self.depths)} do not rise inside a model of {self.layers} layers")
        if (self.format == 3) != bool(self.certificates):
            raise FileError(f"format {self.format} with {len(self.certificates)} certificates; only format 3 has any")


@dataclass(frozen=True)
class _DrafterReport:
    acceptance: dict[Annotated[int, Meta(ge=0, le=9)], Share] = field(default_factory=dict)
    agreement_by_step: tuple[Share, ...] = ()


@dataclass(frozen=True)
class _Report:
    drafter: _DrafterReport = _DrafterReport()


@dataclass(frozen=True)
class Exits:
    """Exit heads at some depths of a model, the trigger that decides when to use them, and a drafter with its datastores.

    ``base`` is the fingerprint of the model they were made for. ``heads`` is None for bare exits, which use the model's own
    final head. ``report`` is what training measured, ``made_by`` the command, data and seed. ``answers`` are texts of any kind,
    ``habits`` those that ``adi habituate`` added: answers to a user's own work.
    """

    base: str
    base_name: str
    layers: int
    width: int
    vocabulary: int
    depths: tuple[int, ...]
    trigger: Trigger
    heads: Heads | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    made_by: Mapping[str, Any] = field(default_factory=dict)
    drafter: Drafter | None = None
    answers: Datastore | None = None
    habits: Datastore | None = None
    probe: Probe | None = None
    certificates: tuple[Certificate, ...] = ()
    _readers: WeakKeyDictionary[Backbone, Reader] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )
    _draftings: WeakKeyDictionary[Backbone, Drafting] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    @classmethod
    def of(cls, spec: Spec, depths: tuple[int, ...], trigger: Trigger, **parts: Any) -> Exits:
        """Exits of the model of this ``spec``; ``parts`` are further fields."""
        return cls(spec.fingerprint, spec.name, spec.layers, spec.width, spec.vocabulary, depths, trigger, **parts)

    def certificate(self, kind: str, level: float, skipped: str = "exact") -> Certificate:
        """What ``adi calibrate`` certified for exactly this level; AdiError where it never did."""
        return find(self.certificates, kind, level, skipped)

    def check(self, backbone: Backbone) -> None:
        """ModelError unless these exits were made for this very model."""
        spec = backbone.spec
        if self.base != spec.fingerprint:
            raise ModelError(
                f"these exits belong to {self.base_name} (fingerprint {self.base}), not to {spec.name} "
                f"(fingerprint {spec.fingerprint}). Make its own with: adi tune {spec.name} --out DIR"
            )
        for name in ("layers", "width", "vocabulary"):  # as the fingerprint says, unless somebody edited the file
            if (mine := getattr(self, name)) != (its := getattr(spec, name)):
                raise FileError(f"these exits are damaged: their {name} is {mine}, the model's {its}.")
        if bad := [d for d in self.depths if d not in spec.stops]:
            raise ModelError(f"the {spec.backend} engine cannot stop at depths {bad}; it can at {list(spec.stops)}.")

    def reader(self, backbone: Backbone) -> Reader:
        """``read(depth, states)``: what the exit at that depth predicts at T rows. Refuses another model."""
        self.check(backbone)
        if backbone not in self._readers:
            self._readers[backbone] = self._make_reader(backbone)
        return self._readers[backbone]

    def _make_reader(self, backbone: Backbone) -> Reader:
        heads = self.heads
        if heads is None:
            model = weakref.ref(backbone)  # or the memory of readers would keep its own keys alive
            return lambda _, states: Prediction(_alive(model).logits(states).log_softmax(-1))
        compiled = {depth: ExitHead(adapter, heads.ids_S, backbone) for depth, adapter in heads.adapters.items()}
        return lambda depth, states: compiled[depth](states)

    def drafting(self, backbone: Backbone) -> Drafting | None:
        """The drafter at work beside this model, made once; None where there is none. Refuses another model."""
        self.check(backbone)
        if self.drafter is None:
            return None
        if backbone not in self._draftings:
            self._draftings[backbone] = Drafting(self.drafter, backbone)
        return self._draftings[backbone]

    @property
    def acceptance(self) -> Mapping[int, float]:
        """How often full depth agreed on held-out text with drafts of each tenth of confidence, 0 to 9, if measured."""
        return self._measured.acceptance

    @property
    def draft_steps(self) -> Sequence[float]:
        """How often full depth agreed there with the drafter's first, second, ... draft in a row, those before it agreeing."""
        return self._measured.agreement_by_step

    @property
    def _measured(self) -> _DrafterReport:
        return from_json(self.report, _Report, "the report of these exits").drafter

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the exits to ``folder``; other files there are left alone. UsageError for bare exits without a gate, which have
        nothing to save.

        Each of the two files is replaced whole, and a folder caught between the two is refused on loading.
        """
        from safetensors.numpy import save_file

        place, arrays = Path(folder), dict(self._stored())
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name in _Document.__struct_fields__}
        known["trigger"] = from_json(self.trigger.to_json(), Rule, "this trigger cannot be saved")
        with whole_file(place / TENSORS) as fresh:
            save_file(arrays, fresh)
        document = _Document(format=3 if self.certificates else 2, tensors=_digest(place / TENSORS), **known)
        write_json(place / JSON, document.to_json())

    def digest(self) -> str:
        """16 hexadecimal digits that change with whatever was learned."""
        return digest(array for _, array in self._stored())

    def _stored(self) -> Iterator[tuple[str, Any]]:
        """Every array by its name in the file: weights in half precision, those of the probe as they are."""
        if self.heads is None and self.probe is None:
            raise UsageError(
                f"bare exits, here at depths {list(self.depths)}, have nothing to save; make them again with "
                "adi.bare_exits(model, depths=...)."
            )
        parts: dict[str, Any] = {}
        if self.heads is not None:
            yield "ids_S", np.ascontiguousarray(as_array(self.heads.ids_S), np.int32)
            parts = {f"{depth}.": adapter.tensors() for depth, adapter in self.heads.adapters.items()}
        parts |= {"drafter.": self.drafter.arrays()} if self.drafter is not None else {}
        parts |= {"answers.": self.answers.arrays()} if self.answers is not None else {}
        parts |= {"habits.": self.habits.arrays()} if self.habits is not None else {}
        parts |= {"probe.": self.probe.tensors()} if self.probe is not None else {}
        for prefix, arrays in parts.items():
            for name, array in arrays.items():
                kind: Any = np.int32 if name in INT32 else None if prefix == "probe." else np.float16
                with np.errstate(over="ignore"):  # what half precision cannot hold is refused on loading
                    yield prefix + name, np.ascontiguousarray(as_array(array), kind)


def _alive(model: weakref.ref[Backbone]) -> Backbone:
    found = model()
    assert found is not None, "a reader outlived its model"
    return found


def require_model(given: Any, *exits: Any) -> None:
    """UsageError for what is no model, or no exits."""
    instance("model", given, Model, "what adi.load gives")
    for one in exits:
        require_exits(one)


def require_exits(given: Any) -> None:
    """UsageError for what are no exits."""
    instance("exits", given, Exits, "adi.load_exits('smollm2-135m'), or of a folder of yours")


def bare_exits(
    model: Model, depths: Sequence[int] | None = None, trigger: Trigger | None = None, *, price: float | None = None
) -> Exits:
    """Exits that read the model's own final norm and head at ``depths`` (the logit lens, nostalgebraist 2020): no training.

    ``depths`` None takes those after half, three quarters and nine tenths of the blocks. On ordinary checkpoints their drafts
    are seldom accepted. The default trigger fires from a probability of 0.5 on.

    Of a ``LoopedForCausalLM``, each of whose turns was trained to answer, the default depths are the ends of all turns but the
    last, and the trigger is its halting gate, at the threshold of its config; ``price`` (nats for a full pass) is for a gate
    that was trained over a range of prices. Such exits can be saved.
    """
    require_model(model)
    spec = model.look()
    network = looped_network(model)
    if price is not None and not (network is not None and network.config.gate_price):
        raise UsageError(f"price is {price!r}, but no gate of this model knows a price; leave it out.")
    if depths is None and spec.loop is not None:
        depths = [spec.loop.first + spec.loop.period * turn for turn in range(1, spec.loop.turns)]
    if depths is None:
        depths = [min(max(1, round(spec.layers * share)), spec.layers - 1) for share in (0.5, 0.75, 0.9)]
    chosen = tuple(sorted(set(depths)))
    if not chosen or any(d not in spec.stops or d >= spec.layers for d in chosen):
        allowed = ", ".join(str(d) for d in spec.stops if d < spec.layers)
        raise UsageError(f"depths {tuple(depths)} are not possible; choose among {allowed}.")
    probe = None if network is None else gate_probe(network, chosen, price)
    if trigger is None:
        trigger = BARE_TRIGGER if probe is None or network is None else Threshold("gate", network.config.halt_threshold)
    return Exits.of(spec, tuple(map(int, chosen)), trigger, probe=probe)


def shipped() -> list[str]:
    """Names of the models whose exits come with the package."""
    return sorted(p.name for p in SHIPPED.iterdir() if p.is_dir()) if SHIPPED.is_dir() else []


def shipped_for(fingerprint: str) -> Exits | None:
    """The exits that come with the package for these weights, None where there are none."""
    for name in shipped():
        if read_json(SHIPPED / name / "exits.json", "exits file")["base"] == fingerprint:
            return load_exits(name)
    return None


def load_exits(source: str | os.PathLike[str]) -> Exits:
    """Exits from a folder, or those shipped with the package for a model ("smollm2-135m").

    Raises FileError for an unknown name, and for a folder that is damaged or written by something else. Whether they
    fit a model is checked when they are first used with one.
    """
    folder = SHIPPED / str(source) if str(source) in shipped() else expanded(source)
    if not os.path.isdir(folder):  # noqa: PTH112, False also for a name that no folder can have
        raise FileError(
            f"there are no exits {str(source)!r}: neither a folder nor shipped ({', '.join(shipped()) or 'none are'}). "
            "Make some with: adi tune MODEL --out DIR"
        )
    value = read_json(folder / JSON, "exits file")
    if not isinstance(value, dict) or value.get("format") not in (1, 2, 3):
        raise FileError(f"{folder / JSON} is not an exits file of format 1 to 3 (made by adi tune).")
    require_file(folder / TENSORS, "exits' tensors", MOST_TENSOR_BYTES)
    try:
        document = from_json(value, _Document, JSON)
        return _exits_of(document, _read_arrays(folder / TENSORS, document.tensors))
    except AdiError as error:
        raise FileError(f"the exits in {folder} are damaged: {error}") from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _read_arrays(path: Path, wanted: str) -> Arrays:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if _digest(path) != wanted:
        raise FileError(f"{path.name} is not the file that {JSON} was written for (its digest differs)")
    try:
        arrays: Arrays = load_file(path)
    except (SafetensorError, OSError, TypeError, AttributeError) as error:  # the last two: a type that numpy lacks
        raise FileError(f"{path.name}: {error}") from None
    return arrays


def _exits_of(document: _Document, arrays: Arrays) -> Exits:
    """The exits of both files; AdiError for arrays that are missing, too many, or of another shape or type."""
    width, vocabulary = document.width, document.vocabulary
    exits = Exits(
        **{f.name: getattr(document, f.name) for f in fields(Exits) if f.name in _Document.__struct_fields__},
        drafter=_drafter(_taken(arrays, "drafter."), width, vocabulary),
        answers=_datastore(_taken(arrays, "answers."), vocabulary, "datastore"),
        habits=_datastore(_taken(arrays, "habits."), vocabulary, "habits"),
        probe=_probe(_taken(arrays, "probe."), document.depths, width),
        heads=_heads(document, arrays),
    )
    if exits.heads is None and exits.probe is None:
        raise FileError(f"{TENSORS} holds neither heads nor a gate")
    _ = exits.acceptance  # refused here where it is damaged
    return exits


def _heads(document: _Document, arrays: Arrays) -> Heads | None:
    """The heads out of all arrays that are left; None, the model's own, where none are."""
    if not arrays:
        return None
    ids_S, width, adapters = arrays.pop("ids_S", None), document.width, {}
    _check_ids(ids_S, document.vocabulary)
    for depth in document.depths:
        own = _taken(arrays, f"{depth}.")
        low_rank = (width, _size(own, "up_DR", -1))
        wanted = {f.name: (width,) for f in fields(Adapter)} | {"up_DR": low_rank, "down_DR": low_rank, "tail_bias": (1,)}
        adapters[depth] = Adapter(**_weights(f"the head at depth {depth}", own, wanted))
    if arrays:
        raise FileError(f"unknown tensors {sorted(arrays)[:3]}")
    return Heads(ids_S.astype(np.int64), adapters)


def _drafter(own: Arrays, width: int, vocabulary: int) -> Drafter | None:
    if not own:
        return None
    ids_S = own.pop("ids_S", None)
    _check_ids(ids_S, vocabulary, "drafter's ")
    wanted = shapes(width, _size(own, "gate_FD", 0))
    return Drafter(ids_S=ids_S.astype(np.int64), **_weights("the drafter", own, wanted))


def _probe(own: Arrays, depths: Sequence[int], width: int) -> Probe | None:
    if not own:
        return None

    def network(kind: str, depth: int) -> Net:
        mine = _taken(own, f"{kind}.{depth}.")
        wanted = network_shapes(kind, width, _size(mine, "out_H", 0))
        weights = _weights(f"the probe's {kind} network at depth {depth}", mine, wanted)
        return Net(**{name: as_tensor(array) for name, array in weights.items()})

    kinds = ("gate",) if all(name.startswith("gate.") for name in own) else ("state", "joint")
    probe = Probe(**{kind: {depth: network(kind, depth) for depth in depths} for kind in kinds})
    if own:
        raise FileError(f"the probe has unknown tensors {sorted(own)[:3]}")
    return probe


def _datastore(own: Arrays, vocabulary: int, name: str) -> Datastore | None:
    if not own:
        return None
    if set(own) != {"ids_N", "lengths_M"}:
        raise FileError(f"the {name}'s tensors are {sorted(own)}, not ids_N and lengths_M")
    datastore = Datastore(**own, name=name)
    datastore.check(vocabulary)
    return datastore


def _taken(arrays: Arrays, prefix: str) -> Arrays:
    """The arrays whose names begin with ``prefix``, without it; they are taken out of ``arrays``."""
    return {name.removeprefix(prefix): arrays.pop(name) for name in list(arrays) if name.startswith(prefix)}


def _size(own: Arrays, name: str, axis: int) -> int:
    """The size of an array along one axis, as the other shapes must have it; 0 where it is missing."""
    return own[name].shape[axis] if name in own and own[name].ndim else 0


def _weights(what: str, own: Arrays, wanted: Mapping[str, tuple[int, ...]]) -> Arrays:
    """The arrays in float32; FileError unless they are those wanted, in these shapes, and finite."""
    if set(own) != set(wanted):
        raise FileError(f"{what} has the tensors {sorted(own)}, not {sorted(wanted)}")
    for name, shape in wanted.items():
        with np.errstate(over="ignore"):
            fits = own[name].shape == shape and own[name].dtype.type in FLOATS
            if not fits or not np.isfinite(own[name].astype(np.float32)).all():
                raise FileError(f"{what}, {name}: shape {own[name].shape} or values are not what they must be")
    return {name: array.astype(np.float32) for name, array in own.items()}


def _check_ids(ids_S: Any, vocabulary: int, whose: str = "") -> None:
    if ids_S is None or ids_S.ndim != 1 or ids_S.dtype != np.int32 or ids_S.size == 0:
        raise FileError(f"the {whose}shortlist ids_S is missing or has another form")
    if int(ids_S.min()) < 0 or int(ids_S.max()) >= vocabulary or len(np.unique(ids_S)) != len(ids_S):
        raise FileError(f"the {whose}shortlist holds ids twice or outside the vocabulary [0, {vocabulary})")
