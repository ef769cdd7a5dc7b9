"""Compiled engines of tiny random models, for several test files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as t

from adi.model.backbone import Rows
from adi.model.hf.weights import fingerprint
from adi.model.openvino import OpenVinoBackbone, export_and_open, manifest
from families import KV, VOCABULARY, C, tiny

IDS = tuple(torch.randint(3, VOCABULARY - 1, (60,), generator=torch.Generator().manual_seed(5)).tolist())
PROMPT = 40  # more than one block of KV memory, and more than the sliding windows
Cached = dict[tuple[str, str], OpenVinoBackbone]
PRECISIONS = ("fp32", "int8", "int4")


def model_of(family: str) -> Any:
    """The family's tiny model; Gemma 3 with a soft cap on its logits as well."""
    if family != "gemma3":
        return tiny(family)
    torch.manual_seed(0)
    config = t.Gemma3TextConfig(**{**C, **KV}, head_dim=8, sliding_window=8, final_logit_softcapping=2.0)
    return t.Gemma3ForCausalLM(config).eval()


def engine(made: Cached, family: str, precision: str = "fp32") -> OpenVinoBackbone:
    if (family, precision) not in made:
        made[family, precision] = export_and_open(model_of(family), name=family, precision=precision)
    return made[family, precision]


def folder_of(family: str, precision: str = "fp32") -> Path:
    return manifest.export_dir(manifest.key_of(model_of(family), fingerprint(model_of(family))), precision)


def prefilled(backbone: Any, ids: tuple[int, ...]) -> Any:
    cache = backbone.new_cache()
    backbone.forward([Rows(cache, 0, ids, None)], 0, backbone.spec.layers)
    return cache
