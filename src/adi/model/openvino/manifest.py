"""What is kept of an exported model: two graphs, the head taken apart, and a manifest about them.

A folder is written whole or not at all. Nothing in it runs code, and the weights of the original need not be there.
"""

from __future__ import annotations

import functools
import hashlib
import json
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from adi.cache import cache_folder, identity, whole_folder
from adi.errors import FileError, ModelError
from adi.files import require_readable, write_json
from adi.model.arrays import as_array, digest
from adi.model.backbone import READOUT_ARRAYS, Loop, ReadOut
from adi.model.hub import first_line
from adi.model.openvino.graph import Attention
from adi.schema import Positive, Record, read_json_as

FORMAT = 8
PRECISIONS = ("fp32", "int8", "int4")  # of weights
BFLOAT16 = "-bf16"  # ends the name of a precision whose blocks compute in bfloat16
MADE_WITH = ("openvino", "transformers")
EXPORTER = ("openvino/export", "openvino/graph.py", "hf/blocks.py", "hf/readout.py", "hf/splitting.py")  # beside this package
NO_MATTER = ("_name_or_path", "transformers_version", "dtype", "architectures")


class NormAndScale(Record, frozen=True):
    """The numbers of a ``ReadOut`` that are no arrays."""

    norm: Annotated[str, Meta(pattern="^(rms|layer|none)$")]
    eps: float
    scale: float


class Manifest(Record, frozen=True):
    """All but weights. ``readout`` holds norm, eps and scale, or the sentence that says why there is none. ``loop`` says which
    blocks share weights, ``turns`` which of them the graph has once. ``holes`` counts each block's ``attentions``, and with
    ``experts`` some blocks have a choice of them."""

    name: str
    family: str
    layers: Positive
    width: Positive
    vocabulary: Positive
    context: Positive | None
    stated_context: Positive | None
    fingerprint: str
    precision: str
    has_mlp: bool
    experts: bool
    attentions: tuple[Attention, ...]
    holes: tuple[Positive, ...]
    loop: Loop | None
    turns: Loop | None
    readout: NormAndScale | str
    format: Annotated[int, Meta(ge=FORMAT, le=FORMAT)] = FORMAT


def key_of(model: Any, weights: str) -> str:
    """Names a model by the fingerprint of its weights and its configuration: a window or a scale matters as well."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in NO_MATTER}
    text = json.dumps([type(model).__name__, config], sort_keys=True, default=str)
    return f"{weights}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def export_dir(key: str, precision: str) -> Path:
    """Where the export of the model of this key in this precision belongs, for the versions installed now and the code of the
    exporter as it is now."""
    made_with = "|".join(f"{package} {version(package)}" for package in MADE_WITH)
    made = hashlib.blake2b(f"{exporter_digest()}|{made_with}".encode(), digest_size=4).hexdigest()
    folder = cache_folder() / "openvino" / f"{key}-{precision}-{made}"
    require_readable(folder / "model.json")
    return folder


@functools.cache
def exporter_digest() -> str:
    """Changes with the text of any module that makes an export."""
    package = Path(__file__).parent.parent
    files = [path for name in EXPORTER for path in (sorted((package / name).glob("*.py")) or [package / name])]
    return digest([], *map(str, files))


def write_export(folder: Path, manifest: Manifest, blocks: Any, head: Any, readout: ReadOut | None) -> None:
    """Write the folder; FileError, naming it, where that cannot be done."""
    import openvino as ov
    from safetensors.numpy import save_file

    with whole_folder(folder) as fresh:
        ov.save_model(blocks, fresh / "blocks.xml", compress_to_fp16=False)
        ov.save_model(head, fresh / "head.xml", compress_to_fp16=False)
        if readout is not None:
            parts = {name: a for name in READOUT_ARRAYS if (a := getattr(readout, name)) is not None}
            arrays = {name: np.ascontiguousarray(as_array(a)) for name, a in parts.items()}
            save_file(arrays, fresh / "readout.safetensors")
        write_json(fresh / "model.json", manifest.to_json())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported model; FileError where the folder holds none of this format, or files that are not this
    user's to read."""
    require_readable(*folder.iterdir())
    try:
        return read_json_as(folder / "model.json", Manifest, "exported model")
    except FileError as error:
        raise FileError(f"{str(error).rstrip('.')}; delete it and load the model again.") from None


def _damaged(folder: Path, error: Exception) -> FileError:
    return FileError(f"the exported model in {folder} is damaged ({first_line(error)}); delete it and load the model again.")


def read_graphs(folder: Path, core: Any) -> tuple[Any, Any]:
    """Blocks with their holes, and head; weights stay on disk until they are needed."""
    try:
        return core.read_model(folder / "blocks.xml"), core.read_model(folder / "head.xml")
    except RuntimeError as error:
        raise FileError(
            f"the exported model in {folder} is damaged ({first_line(error)}); delete it and load the model again."
        ) from None


def read_readout(folder: Path, manifest: Manifest) -> ReadOut:
    """The head taken apart at export, its numbers left on disk until looked at; ValueError says why a family has none."""
    from safetensors import SafetensorError

    if isinstance(manifest.readout, str):
        raise ModelError(manifest.readout)
    try:
        arrays = _mapped(folder / "readout.safetensors")
        parts: Any = {name: arrays.get(name) for name in READOUT_ARRAYS}
        return ReadOut(**manifest.readout.to_json(), **parts)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise FileError(
            f"the exported model in {folder} is damaged ({first_line(error)}); delete it and load the model again."
        ) from None


def _mapped(path: Path) -> dict[str, Any]:
    """A file's arrays of float32 over the file itself: of a whole vocabulary's head most readers want a few thousand rows."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as found:  # refuses what is no such file, or has another length than it says
        names = set(found.keys())
    with path.open("rb") as file:
        start = int.from_bytes(file.read(8), "little")
        stated = json.loads(file.read(start))
    if any(stated[name]["dtype"] != "F32" for name in names):
        raise TypeError("its readout is not in float32")
    places = {name: 8 + start + stated[name]["data_offsets"][0] for name in names}
    return {name: np.memmap(path, np.float32, "c", places[name], tuple(stated[name]["shape"])) for name in names}


def _note_path(source: Path) -> Path:
    """Named by what the files are now, so that an edited model is exported anew, and one that was copied is found."""
    if source.parent == cache_folder() / "converted":  # never edited, and its name tells what it was made from
        key = source.name
    else:
        key = identity(sorted(p for p in source.iterdir() if p.suffix in (".safetensors", ".bin", ".json")))
    return cache_folder() / "sources" / f"{key}.json"


class _Note(Record, frozen=True):
    key: Annotated[str, Meta(pattern=r"^[0-9a-f]+-[0-9a-f]+$")]


def remember(source: Path, key: str) -> None:
    """Note that the model folder ``source`` is the model of this key, so that its weights need not be read again."""
    with suppress(FileError):  # a cache that cannot be written
        write_json(_note_path(source), {"key": key})


def recall(source: Path, precision: str) -> Path | None:
    """The export of the model folder ``source``, or None when there is none for the versions installed now."""
    require_readable(note := _note_path(source))
    if not note.exists():
        return None
    folder = export_dir(read_json_as(note, _Note, "note about an export").key, precision)
    return folder if (folder / "model.json").exists() else None
