"""Export: once per model and precision, from the loaded transformers model to a folder that needs it no more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from adi.errors import AdiError, ModelError, NotExportableError
from adi.model.backbone import ReadOut, Rows
from adi.model.hf import HfBackbone
from adi.model.hf.splitting import decoder_of
from adi.model.hub import Notice
from adi.model.openvino.engine import OpenVinoBackbone
from adi.model.openvino.export.graphs import compiled_loop, name_ports, rolled, split_head, stage_blocks, tidy
from adi.model.openvino.export.quantize import quantize
from adi.model.openvino.export.trace import attentions, foreign, told, trace
from adi.model.openvino.graph import cut, fill_holes
from adi.model.openvino.manifest import Manifest, NormAndScale, write_export
from adi.model.openvino.turns import cuts

Ran = Sequence[tuple[Any, int, tuple[int, ...]]]  # cache, first position and tokens of some rows
CHECK_TOKENS = 40  # past the first block of KV memory
CHECK_WINDOW = 1100  # windows up to here are left behind in the check
TOLERANCE = 1e-3
ONE_SHAPE = "its graph runs for the rows of its tracing alone, as where its own code sends rows to experts in a Python loop"


def export(
    hf: HfBackbone,
    folder: Path,
    precision: str,
    samples: Sequence[Sequence[int]],
    notice: Notice,
    let_go: Callable[[], object] = lambda: None,
) -> None:
    """Write the model of ``hf`` to ``folder`` for ``OpenVinoBackbone.open``; ``samples``, ``let_go`` are as for ``quantize``.

    Raises ValueError, in one sentence that names the architecture, for a model that cannot be exported, or whose exported
    graph does not give the model's own logits.
    """
    notice(f"Exporting {hf.spec.name} to OpenVINO once, in {precision} (kept in {folder})")
    try:
        manifest, blocks, head = _graphs(hf, precision)
        let_go()
        with foreign(ONE_SHAPE, RuntimeError):
            _check(hf, manifest, blocks.clone(), head.clone(), let_go)
        read = [ids[: manifest.context] for ids in samples]
        blocks, head = quantize(blocks.clone(), head.clone(), precision, manifest.attentions, read, let_go)
    except AdiError as error:
        reason = str(error).rstrip(".")
        raise NotExportableError(f"{type(hf.model).__name__} cannot be exported to OpenVINO: {reason}.") from error
    manifest, readout = _with_readout(hf, manifest)
    write_export(folder, manifest, blocks, head, readout)


def _graphs(hf: HfBackbone, precision: str) -> tuple[Manifest, Any, Any]:
    spec = hf.spec
    _, modules = decoder_of(hf.model)
    found, given, tape = attentions(hf.model, modules)
    places, mlps = tape.places, len(tape.mlps)
    traced = trace(hf.model, modules, given, tape.written_out)
    name_ports(traced, found, spec.layers, mlps)
    loop = compiled_loop(traced, spec.loop)
    graph, holes = rolled(traced, loop, places, spec.layers)
    tidy(graph)
    kept = [places[i] for i in holes]
    made = list(dict.fromkeys(kept))
    blocks, head = split_head(graph, len(made), spec.width)
    manifest = Manifest(
        name=spec.name,
        family=spec.family,
        layers=spec.layers,
        width=spec.width,
        vocabulary=spec.vocabulary,
        context=min(filter(None, (spec.context, tape.longest)), default=None),
        stated_context=spec.context,
        fingerprint=spec.fingerprint,
        precision=precision,
        has_mlp=mlps == spec.layers,
        experts=tape.experts,
        attentions=tuple(found[i] for i in holes),
        holes=tuple(kept.count(block) for block in made),
        loop=spec.loop,
        turns=loop,
        readout="",
    )
    if spec.loop is not None:
        _require_one_state(manifest, blocks.clone())
    return manifest, blocks, head


def _require_one_state(manifest: Manifest, blocks: Any) -> None:
    """ModelError where a block of a looped model reads what others than the one before it gave, but for ids and positions."""
    layers = len(manifest.holes)
    fill_holes(blocks, manifest.attentions)
    for part in cut(blocks, cuts(manifest.turns, layers, range(1, layers + 1)), manifest.width):
        names = [port.get_any_name() for port in part.graph.inputs]
        attended = {int(name.split(".")[1]) for name in names if name.startswith("key_cache.")}
        own = set(range(sum(manifest.holes[: part.lo]), sum(manifest.holes[: part.hi])))
        if names.count("hidden") > 1 or attended - own:
            raise ModelError(
                f"block {part.lo} reads more than what the one before it gave, as where a prelude enters every turn or two "
                "stacks feed each other, and one state is stored between blocks"
            )


def _with_readout(hf: HfBackbone, manifest: Manifest) -> tuple[Manifest, ReadOut | None]:
    try:
        readout = hf.readout()
    except AdiError as error:
        return replace(manifest, readout=str(error)), None
    return replace(manifest, readout=NormAndScale(readout.norm, readout.eps, readout.scale)), readout


def _check(hf: HfBackbone, manifest: Manifest, blocks: Any, head: Any, let_go: Callable[[], object]) -> None:
    """In float32, run in parts, after a rollback and beside another sequence: the model's own logits, or no export."""
    windows = [a.window for a in manifest.attentions if 0 < a.window <= CHECK_WINDOW]
    length = min(max([CHECK_TOKENS, *(w + 8 for w in windows)]), manifest.context or CHECK_TOKENS)
    generator = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(0, manifest.vocabulary, (length,), generator=generator).tolist())
    with torch.no_grad():
        wanted = hf.model(torch.tensor([ids]), use_cache=False, **told(hf.model, torch.arange(length)[None])).logits[0].float()
    let_go()
    fp32 = OpenVinoBackbone(replace(manifest, precision="fp32"), blocks, head)  # KV memory in 32 bits too
    cache, mate, past = fp32.new_cache(), fp32.new_cache(), length // 2
    first = [(cache, 0, ids[: past + 1]), (mate, 0, ids[1:4])]
    early = [[(cache, past, ids[past : past + 1])], [(cache, past + 1, ids[past + 1 :]), (mate, 3, ids[4:6])]]
    hidden_TD = _in_parts(fp32, blocks, first, early, [(cache, past, ids[past:])], let_go)
    error = float((fp32.logits(hidden_TD) - wanted[past:]).abs().max())
    if not error <= TOLERANCE * max(1.0, float(wanted.abs().max())):
        raise ModelError(f"run in parts its logits differ from its own forward by {error:.2g}")


def _in_parts(
    fp32: OpenVinoBackbone, blocks: Any, first: Ran, early: Sequence[Ran], late: Ran, let_go: Callable[[], object]
) -> torch.Tensor:
    """What leaves the last block of the rows ``late`` where ``early`` ran the first half, all after the rows ``first``. Some
    blocks at a time are compiled, so that their weights in 32 bits are never all there."""
    layers, loop = fp32.spec.layers, fp32.spec.loop
    half, step = max(1, layers // 2), layers if loop else stage_blocks(blocks, layers)
    ends = sorted({*range(0, half, step), *range(half, layers, step), layers})
    states: dict[int, Any] = {}

    def run(rows: Ran, lo: int, hi: int) -> None:
        given = states.get(id(rows), [None] * len(rows))
        states[id(rows)] = [s.hidden_TD for s in fp32.forward([Rows(*r, s) for r, s in zip(rows, given, strict=True)], lo, hi)]

    for lo, hi in pairwise(ends):
        if len(ends) > 3:
            fp32.hold(lo, hi)
        let_go()
        for rows in (first, *early) if hi <= half else (first, late):
            run(rows, lo, hi)
        if hi == half:
            states[id(late)] = [torch.cat([states[id(rows)][0] for rows in early])]
    found: torch.Tensor = states[id(late)][0]
    return found
