"""A graph as OpenVINO's own tools have users make it (optimum-intel's export): stateful, weights compressed by NNCF.

Made once per model, kept in adi's cache folder; only the benchmark of OpenVINO GenAI needs it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adi.cache import cache_folder, usable_cache, whole_folder
from adi.errors import UsageError
from adi.measure.provenance import files_hash
from adi.model.hub import DEFAULT, READING, local_folder, quiet_transformers
from adi.model.openvino.export.in_float32 import in_float32

FORMAT = 1
MADE_WITH = ("openvino", "nncf", "openvino-tokenizers", "transformers")
GROUPS = (128, 64, 32)  # inputs that share a 4-bit scale: the first that divides every matrix
PAST = 3  # positions of KV memory in the example that is traced
TOLERANCE = 1e-3
CHECKED = 2_000_000_000  # weights; those of a larger model are not run in 32 bits


def _folder(source: Path, weights: str) -> Path:
    """Where the graph of the model folder ``source`` belongs, for its files as they are and the versions installed now."""
    facts = [FORMAT, files_hash(source.resolve()), [(name, version(name)) for name in MADE_WITH]]
    key = hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()
    return cache_folder() / "openvino-genai" / f"{source.name}-{weights}-{key}"


def genai_export(source: Path, weights: str) -> Path:
    """The folder that ``openvino_genai.LLMPipeline`` opens, with weights "fp32", "int8" or "int4"; made if it is not there.

    Raises AdiError where a matrix does not divide into groups, or the graph does not give the model's own logits.
    """
    target = _folder(source, weights)
    if target.is_dir():
        return target
    usable_cache()
    target = _folder(source, weights)
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        options: dict[str, Any] = {"dtype": "auto", "attn_implementation": "sdpa", "trust_remote_code": False}
        with READING:
            model = AutoModelForCausalLM.from_pretrained(source, **options).eval()
        home = source if (source / "tokenizer.json").exists() else local_folder(DEFAULT, lambda _: None)
        tokenizer = AutoTokenizer.from_pretrained(home, trust_remote_code=False)
    with in_float32(model):
        graph = stateful_graph(model)
        if sum(p.numel() for p in model.parameters()) <= CHECKED:
            _check(model, graph)
    graph = _compressed(graph, weights, model)
    with whole_folder(target) as fresh:
        ov.save_model(graph, fresh / "openvino_model.xml", compress_to_fp16=False)
        for name, part in zip(("tokenizer", "detokenizer"), convert_tokenizer(tokenizer, with_detokenizer=True), strict=True):
            ov.save_model(part, fresh / f"openvino_{name}.xml")
        model.config.save_pretrained(fresh)
        model.generation_config.save_pretrained(fresh)
    return target


class StatefulStep(nn.Module):
    """The model as a function of tokens, masks, positions and its KV memory, which it returns grown."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        row_T = torch.arange(input_ids.shape[1]) + past[0].shape[2]
        seen_TT = torch.arange(attention_mask.shape[1])[None, :] <= row_T[:, None]
        mask = seen_TT[None, None] & (attention_mask[:, None, None, :] > 0)
        out = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        return (out.logits, *(t for layer in cache.layers for t in (layer.keys, layer.values)))


def stateful_graph(model: Any) -> Any:
    """The model's graph with the inputs and the state that OpenVINO GenAI expects."""
    import openvino as ov
    from openvino import opset13 as op
    from openvino._offline_transformations import apply_make_stateful_transformation

    config = model.config.get_text_config(decoder=True)
    heads = config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    memory = [f"{i}.{part}" for i in range(config.num_hidden_layers) for part in ("key", "value")]
    ids = torch.ones(2, 2, dtype=torch.long)
    given = (ids, torch.ones(2, PAST + 2, dtype=torch.long), torch.tensor([[PAST, PAST + 1]] * 2))
    past = [torch.zeros(2, heads, PAST, width) for _ in memory]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer warns of every branch
        graph = ov.convert_model(StatefulStep(model), example_input=(*given, *past))
    kept = {f"past_key_values.{name}": f"present.{name}" for name in memory}
    for port, name in zip(graph.inputs, ("input_ids", "attention_mask", "position_ids", *kept), strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(ov.PartialShape([-1, heads, -1, width] if name in kept else [-1, -1]))
    for port, name in zip(graph.outputs, ("logits", *kept.values()), strict=True):
        port.get_tensor().set_names({name})
    beams = op.parameter([-1], ov.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    graph.add_parameters([beams])
    for name in kept:  # the state follows its beam
        port = graph.input(name)
        readers = port.get_target_inputs()
        chosen = op.gather(port, beams, op.constant(0))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, kept)
    batch = op.gather(op.shape_of(graph.input("input_ids"), output_type="i64"), op.constant([0]), op.constant(0))
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":  # begins empty
            shape = op.concat([batch, op.constant([heads, 0, width], dtype="int64")], axis=0)
            node.set_arguments([op.broadcast(op.constant(0.0, dtype="float32"), shape)])
    graph.validate_nodes_and_infer_types()
    return graph


def _check(model: Any, graph: Any) -> None:
    """In two passes, the second of one row: the model's own logits, or AdiError."""
    import numpy as np
    import openvino as ov

    ids = [(7 * i + 1) % model.config.get_text_config(decoder=True).vocab_size for i in range(9)]
    with torch.no_grad():
        wanted = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    request = ov.Core().compile_model(graph, "CPU", exact).create_infer_request()
    for start, end in ((0, 8), (8, 9)):
        inputs = {"input_ids": [ids[start:end]], "attention_mask": [[1] * end], "position_ids": [list(range(start, end))]}
        request.infer({k: np.array(v, dtype=np.int64) for k, v in inputs.items()} | {"beam_idx": np.zeros(1, np.int32)})
        got = request.get_output_tensor(0).data[0]
        if (error := float(np.abs(got - wanted[start:end]).max())) > TOLERANCE:
            raise UsageError(f"the exported graph's logits are off by {error:.3g}, so it is not this model.")


def _compressed(graph: Any, weights: str, model: Any) -> Any:
    if weights == "fp32":
        return graph
    with _quiet_nncf():
        import nncf

        mode = nncf.CompressWeightsMode
        if weights == "int8":
            return nncf.compress_weights(graph, mode=mode.INT8_ASYM)
        return nncf.compress_weights(graph, mode=mode.INT4_ASYM, group_size=_group(model), ratio=1.0)


@contextlib.contextmanager
def _quiet_nncf() -> Iterator[None]:
    """NNCF logs tables and draws bars, and torch warns that it finds no CUDA as NNCF is imported; nobody's business here.

    What other threads print is left alone.
    """
    torch_log = logging.getLogger("torch.utils.cpp_extension")
    before = torch_log.level
    torch_log.setLevel(logging.ERROR)
    from nncf.quantization.algorithms.weight_compression import algorithm

    log, track = logging.getLogger("nncf"), algorithm.track
    level = log.level
    log.setLevel(logging.ERROR)
    algorithm.track = functools.partial(track, disable=True)
    try:
        yield
    finally:
        algorithm.track = track
        log.setLevel(level)
        torch_log.setLevel(before)


def _group(model: Any) -> int:
    inputs = {m.in_features for m in model.modules() if isinstance(m, nn.Linear)}
    for group in GROUPS:
        if not any(n % group for n in inputs):
            return group
    raise UsageError(f"matrices with {sorted(inputs)} inputs do not divide into groups of {GROUPS[-1]} for int4.")
