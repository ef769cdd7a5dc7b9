"""``Exits``: heads, trigger and report in one value, saved beside the fingerprint of the model they belong to.

A saved folder holds ``exits.json`` and ``exits.safetensors``; loading runs no code.
"""

from __future__ import annotations

import functools
import hashlib
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from adi.artifact_parts import answers_of, drafter_of, heads_of
from adi.drafters.datastore import Datastore
from adi.drafters.network import Drafter, Drafting
from adi.errors import AdiError
from adi.exits.heads import Adapter, Heads, light_head, predict, shortlist
from adi.exits.probe import Probe, probe_of
from adi.exits.signals import Measured, Prediction
from adi.exits.triggers import Threshold, Trigger, trigger_from_json
from adi.files import expanded, read_json, require_file, write_json
from adi.model.arrays import as_array
from adi.model.backbone import Backbone
from adi.model.load import Model
from adi.risk.certificate import Certificate, find

if TYPE_CHECKING:
    from torch import Tensor

NOT_JSON = ("heads", "trigger", "drafter", "answers", "probe", "certificates")
FORMAT = 2
CERTIFIED = 3  # the format of exits with certificates; the same, with one field more
READ = (1, 2, CERTIFIED)  # formats: the first knew no drafter
SHIPPED = Path(__file__).parent / "data" / "exits"
JSON_TEXTS = ("base", "base_name")
JSON_COUNTS = ("layers", "width", "vocabulary")
JSON_FIELDS = {"format", *JSON_TEXTS, *JSON_COUNTS, "depths", "trigger", "tensors", "report", "made_by"}
MOST_TENSOR_BYTES = 8 << 30
BARE_TRIGGER = Threshold("top_probability", 0.5)
Reader = Callable[[int, "Tensor"], Prediction | Measured]


@dataclass(frozen=True)
class Exits:
    """Where a model may stop early, what it says there and when to believe it.

    ``base`` is the fingerprint of the model they were made for. ``heads`` is None for bare exits, which speak through the
    model's own final head. ``report`` is what training measured, ``made_by`` the command, data and seed.
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
    probe: Probe | None = None
    certificates: tuple[Certificate, ...] = ()
    _readers: WeakKeyDictionary[Backbone, Reader] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )
    _draftings: WeakKeyDictionary[Backbone, Drafting] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def with_trigger(self, trigger: Trigger) -> Exits:
        """The same exits under another trigger."""
        return replace(self, trigger=trigger)

    def certificate(self, kind: str, level: float, skipped: str = "exact") -> Certificate:
        """What ``adi calibrate`` certified for exactly this level; ValueError where it never did."""
        return find(self.certificates, kind, level, skipped)

    def check(self, backbone: Backbone) -> None:
        """ValueError unless these exits were made for this very model."""
        spec = backbone.spec
        if self.base != spec.fingerprint:
            raise AdiError(
                f"these exits belong to {self.base_name} (fingerprint {self.base}), not to {spec.name} "
                f"(fingerprint {spec.fingerprint}). Make its own with: adi tune {spec.name} --out DIR"
            )
        for name in JSON_COUNTS:  # where the fingerprint is the model's, these are, unless somebody wrote others
            if (mine := getattr(self, name)) != (its := getattr(spec, name)):
                raise AdiError(f"these exits are damaged: their {name} is {mine}, the model's {its}.")
        if bad := [d for d in self.depths if d not in spec.stops]:
            raise AdiError(f"the {spec.backend} engine cannot stop at depths {bad}; it can at {list(spec.stops)}.")

    def reader(self, backbone: Backbone) -> Reader:
        """``read(depth, hidden_TD)``: what the exit at that depth says of T rows. Refuses another model."""
        self.check(backbone)
        if backbone not in self._readers:
            self._readers[backbone] = self._make_reader(backbone)
        return self._readers[backbone]

    def _make_reader(self, backbone: Backbone) -> Reader:
        heads = self.heads
        if heads is None:
            model = weakref.ref(backbone)  # or the memory of readers would keep its own keys alive
            return lambda _, hidden_TD: Prediction(_alive(model).logits(hidden_TD).log_softmax(-1))
        among = shortlist(backbone.readout().tensors(), heads.ids_S)
        device = among.weight_SD.device
        moved = {d: Adapter(**{n: t.to(device) for n, t in a.tensors().items()}) for d, a in heads.adapters.items()}
        compiled = {depth: backbone.light_head(light_head(adapter, among)) for depth, adapter in moved.items()}

        def read(depth: int, hidden_TD: Tensor) -> Prediction | Measured:
            head = compiled[depth]
            if head is None:
                return predict(moved[depth], among, hidden_TD)
            whole = functools.partial(head.log_probs, hidden_TD)
            return Measured(head.read(hidden_TD), among.ids_S, among.vocabulary - len(among.ids_S), whole)

        return read

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
        known = self.report.get("drafter", {}).get("acceptance", {})
        shares = {int(place): float(share) for place, share in known.items()}
        if not all(0 <= place <= 9 and 0 <= share <= 1 for place, share in shares.items()):
            raise AdiError("the report's acceptance is no table from tenths, 0 to 9, to shares, 0 to 1")
        return shares

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the exits to ``folder``; other files there are left alone. Bare exits have nothing to save: ValueError.

        Each of the two files is replaced whole, and a folder caught between the two is refused on loading.
        """
        from safetensors.numpy import save_file

        if self.heads is None:
            raise AdiError("bare exits have nothing to save; make them again with adi.bare_exits(model, depths=...).")
        arrays = {"ids_S": _stored(self.heads.ids_S, np.int32)}
        for depth, adapter in self.heads.adapters.items():
            for f in fields(adapter):
                arrays[f"{depth}.{f.name}"] = _stored(getattr(adapter, f.name), np.float16)
        for name, array in self.drafter.arrays().items() if self.drafter is not None else ():
            arrays[f"drafter.{name}"] = _stored(array, np.int32 if name == "ids_S" else np.float16)
        for name, array in self.answers.arrays().items() if self.answers is not None else ():
            arrays[f"answers.{name}"] = _stored(array, np.int32)
        for name, tensor in self.probe.tensors().items() if self.probe is not None else ():
            arrays[f"probe.{name}"] = _stored(tensor)
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        partial = place / ".exits.safetensors.tmp"
        save_file(arrays, partial)
        partial.replace(place / "exits.safetensors")
        write_json(place / "exits.json", self._json(_digest(place / "exits.safetensors")))

    def _json(self, tensors: str) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name not in NOT_JSON}
        own = {"depths": list(self.depths), "trigger": self.trigger.to_json(), "tensors": tensors}
        if not self.certificates:
            return {"format": FORMAT, **plain, **own}
        return {"format": CERTIFIED, **plain, **own, "certificates": [c.to_json() for c in self.certificates]}


def _stored(given: Any, kind: Any = None) -> Any:
    with np.errstate(over="ignore"):  # what half precision cannot hold is refused on loading
        return np.ascontiguousarray(as_array(given), kind)


def _alive(model: weakref.ref[Backbone]) -> Backbone:
    found = model()
    assert found is not None, "a reader outlived its model"
    return found


def bare_exits(model: Model, depths: Sequence[int], trigger: Trigger = BARE_TRIGGER) -> Exits:
    """Exits that speak through the model's own final norm and head at ``depths``: no training, any model.

    They are exact when verified and, on ordinary checkpoints, poor guesses (the logit lens, nostalgebraist 2020). The
    default trigger believes a token from a probability of 0.5 on.
    """
    spec = model.backbone.spec
    chosen = tuple(sorted(set(depths)))
    if not chosen or any(d not in spec.stops or d >= spec.layers for d in chosen):
        allowed = ", ".join(str(d) for d in spec.stops if d < spec.layers)
        raise AdiError(f"depths {tuple(depths)} are not possible; choose among {allowed}.")
    return Exits(spec.fingerprint, spec.name, spec.layers, spec.width, spec.vocabulary, chosen, trigger)


def shipped() -> list[str]:
    """Names of the models whose exits come with the package."""
    return sorted(p.name for p in SHIPPED.iterdir() if p.is_dir()) if SHIPPED.is_dir() else []


def load_exits(source: str | os.PathLike[str]) -> Exits:
    """Exits from a folder, or those shipped with the package for a model ("smollm2-135m").

    Raises ValueError for an unknown name, and for a folder that is damaged or written by something else. Whether they
    fit a model is checked when they meet one.
    """
    folder = SHIPPED / str(source) if str(source) in shipped() else expanded(source)
    if not _is_folder(folder):
        raise AdiError(
            f"there are no exits {str(source)!r}: neither a folder nor shipped ({', '.join(shipped()) or 'none are'}). "
            "Make some with: adi tune MODEL --out DIR"
        )
    value = read_json(folder / "exits.json", "exits file")
    more = {"certificates"} if isinstance(value, dict) and value.get("format") == CERTIFIED else set()
    if not isinstance(value, dict) or value.get("format") not in READ or set(value) != JSON_FIELDS | more:
        raise AdiError(f"{folder / 'exits.json'} is not an exits file of format {FORMAT} or {CERTIFIED} (made by adi tune).")
    try:
        return _parse(value, _arrays(folder / "exits.safetensors", value["tensors"]))
    except (ValueError, RecursionError) as error:
        raise AdiError(f"the exits in {folder} are damaged: {error}") from None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no folder can have
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _arrays(path: Path, digest: Any) -> dict[str, Any]:
    from safetensors.numpy import load_file

    require_file(path, "exits' tensors", MOST_TENSOR_BYTES)
    try:
        right = _digest(path) == digest
        arrays: dict[str, Any] = load_file(path) if right else {}
    except Exception as error:  # what a foreign file makes the reader raise
        raise AdiError(f"{path.name}: {error}") from None
    if not right:
        raise AdiError(f"{path.name} is not the file that exits.json was written for (its digest differs)")
    return arrays


def _parse(value: dict[str, Any], arrays: dict[str, Any]) -> Exits:
    for name in JSON_COUNTS:
        if type(value[name]) is not int or not 1 <= value[name] < 1 << 31:
            raise AdiError(f"{name} is {value[name]!r}, not a positive whole number")
    for name in JSON_TEXTS:
        if not isinstance(value[name], str):
            raise AdiError(f"{name} is {value[name]!r}, not a text")
    for name in ("report", "made_by"):
        if not isinstance(value[name], dict):
            raise AdiError(f"{name} is not an object")
    depths = value["depths"]
    if not isinstance(depths, list) or not depths or any(type(d) is not int for d in depths) or depths != sorted(set(depths)):
        raise AdiError(f"depths is {depths!r}, not a rising list of whole numbers")
    if not 0 < depths[0] <= depths[-1] < value["layers"]:
        raise AdiError(f"depths {depths} do not lie inside a model of {value['layers']} layers")
    drafter = drafter_of(value["width"], value["vocabulary"], arrays)
    answers = answers_of(value["vocabulary"], arrays)
    own = {name: array for name, array in arrays.items() if not name.startswith(("drafter.", "answers.", "probe."))}
    heads = heads_of(depths, value["width"], value["vocabulary"], own)
    certificates = value.get("certificates", [])
    if not isinstance(certificates, list):
        raise AdiError("certificates is not a list")
    known = {k: value[k] for k in ("base", "base_name", "layers", "width", "vocabulary", "report", "made_by")}
    exits = Exits(
        **known,
        depths=tuple(depths),
        trigger=trigger_from_json(value["trigger"]),
        heads=heads,
        drafter=drafter,
        answers=answers,
        probe=probe_of(depths, value["width"], arrays),
        certificates=tuple(Certificate.from_json(item) for item in certificates),
    )
    try:
        _ = exits.acceptance
    except (AttributeError, TypeError, OverflowError) as error:
        raise AdiError(f"the report's acceptance is no table: {error}") from None
    return exits
