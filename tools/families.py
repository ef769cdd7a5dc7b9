"""Which decoder families run exactly: ``python tools/families.py [FAMILY ...] [--engine hf|compiled] [--again] [--table]``.

A tiny random model of every family of transformers' causal language models (hidden 32, 6 blocks, vocabulary 128, window 8)
gives 24 greedy tokens after 12 under six policies and in a batch, and each must be ``model.generate``'s text. Results go to
``docs/results/families.json``, one entry a family, so a run that was stopped goes on where it was (``--again`` measures what
was measured on another state of the code); ``--table`` writes ``docs/families.md`` from it. Each family has a process of its
own and ``--limit`` seconds of processor time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers as t
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

import adi
from adi.errors import AdiError

sys.path.insert(0, str(Path(__file__).parent))
from family_settings import KINDS, NAMES, VOCABULARY, configuration

ROOT = Path(__file__).parents[1]
TRIED = {**FAMILIES, **KINDS}
RESULTS, PAGE = ROOT / "docs/results/families.json", ROOT / "docs/families.md"
PROMPT, NEW, DRAFTS = 12, 24, 4
LONG: dict[str, Any] = {"max_new_tokens": NEW, "stop_at_eos": False}
SCALES = ((0.08, 0.05), (0.3, 0.16))  # of weights, and in blocks from the third on; the second where the first says one token


HEAD = """# Families

Every family that transformers {version} maps to a causal language model ({families}) and some more, tried with a tiny random
model (hidden 32, 6 blocks, vocabulary 128, sliding windows of 8) by `python tools/families.py`; this page is
`python tools/families.py --table` over [the results](results/families.json). **Exact** means that 24 greedy tokens after 12 are
those of `model.generate` under six policies (drafts from bare exits as the controller likes, always four drafts, ragged ones
from two depths, full depth, lookup, `Verified()`), also in a batch. On transformers' modules {exact} of {families} are exact,
compiled (fp32) {compiled}.

{measured}

What **memory** says: *cut*: keys and values, going back is a smaller length. *front*: memory that cannot be cut; what was
accepted since the last snapshot runs again in front of the next rows, at no pass of its own. *apart*: the same in a pass of
its own, since what writes that memory could not be told from the whole block. *singly*: the modules that write it get rows one
by one. Sizes of real checkpoints, and texts longer than these, were not tried here.

**Compiled**: attention that a family's code writes out as products is looked at over 2,048 tokens, and no longer texts are run;
attention in chunks runs up to one chunk. Where rows' bits depend on how many share a pass, the table says so; where nothing is
said, the engine found that they do not (of some families only without copies for fixed numbers of rows, which it then forgoes).
"""
_NO_LM = "no language model by itself: it needs"
WHY = {
    "blt": "its blocks read bytes and patches of them, and its configuration has no one number of blocks",
    "cpmant": "it puts places for a prompt before the text, and its position bias is of both",
    "dots3_note": "tried as dots3_note_text, its text part",
    "gemma3n": "its vision tower needs Pillow and timm; gemma3n_text is its text part",
    "gemma4_assistant": f"{_NO_LM} the states of a Gemma 4 to draft for",
    "gemma4_unified_assistant": f"{_NO_LM} the states of a Gemma 4 to draft for",
    "hy_v4": "blocks read which keys the block before chose: as many indices as the text is long, which are not stored",
    "inkling2_text": "its head reads the token's embedding beside the last state, and a state alone does not have it",
    "minimax": "its forward takes no cache but one of its own class",
    "mllama": "blocks that look at an image are skipped where there is none",
    "musicgen": f"{_NO_LM} an encoder's states",
    "musicgen_melody": f"{_NO_LM} an encoder's states",
    "nemotron_h_omni": "its language-model head belongs to its text part (nemotron_h) and not to the whole",
    "openai-gpt": "its code keeps no memory of the past",
    "prophetnet": "its cache is an encoder-decoder's",
    "recurrent_gemma": "its modules keep a part of their state in themselves and not in the cache",
    "reformer": "its cache keeps buckets of hashed states, not keys and values",
    "rwkv": "its code keeps its memory in a list of its own and not in a cache",
    "xlm": "transformers runs it as an encoder alone",
    "xlnet": "its code keeps no cache of keys and values",
    "xlstm": "its code keeps its memory in a class of its own and not in a cache",
}
WHY_COMPILED = {
    "emu3": "its text part has no name in AutoModelForCausalLM, and what is compiled is read from a folder",
    "xmod": "its language adapters write rows in place (aten::index_put_), for which OpenVINO has no operation",
}


def tiny(family: str, scale: tuple[float, float] = SCALES[0], seed: int = 0) -> Any:
    """The family's random model in float32; end-of-sequence is switched off, so that texts have full length."""
    kind = getattr(t, TRIED[family])
    torch.manual_seed(seed)
    model = kind(configuration(family, kind)).eval().float()
    for name, kept in model.state_dict().items():
        if kept.is_floating_point():
            drawn = torch.randn(kept.shape) * scale[any(f".{block}." in name for block in range(2, 6))]
            kept.copy_(drawn if kept.dim() > 1 else kept + drawn)  # a bias of zeros or a norm of ones hides that it is left out
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id, generation.suppress_tokens = None, 0, None
    for name in ("forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens"):
        setattr(generation, name, None)
    return model


def texts(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """transformers' own."""
    with torch.no_grad():
        return [
            model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, min_new_tokens=NEW)[0, PROMPT:].tolist()
            for ids in prompts
        ]


def prompts() -> list[list[int]]:
    drawn = torch.randint(3, VOCABULARY - 1, (2, PROMPT), generator=torch.Generator().manual_seed(5))
    return drawn.tolist()  # type: ignore[no-any-return]


def policies(model: adi.Model) -> dict[str, Any]:
    """Six, of which three draft in every round."""
    layers = model.backbone.spec.layers
    depths = tuple(sorted({max(1, layers // 3), max(1, 2 * layers // 3)} - {layers})) or (1,)
    exits = adi.bare_exits(model, depths)
    ragged = adi.AnyOf((adi.Threshold("stability", 0.6), adi.Threshold("top_probability", {depths[-1]: 0.0})))
    return {
        "exits": adi.Verified(exits),
        "always": adi.Verified(exits, adi.Threshold("top_probability", 0.0), draft_tokens=DRAFTS),
        "ragged": adi.Verified(exits, ragged, draft_tokens=DRAFTS),
        "full": adi.FullDepth(),
        "lookup": adi.Lookup(),
        "verified": adi.Verified(),
    }


def measured(family: str, engine: str) -> dict[str, Any]:
    """One family's entry: "exact", or why not."""
    for scale in SCALES:
        model = tiny(family, scale)
        wanted = texts(model, prompts())
        if len(set(wanted[0])) > 2:
            break
    try:
        loaded = _loaded(model, engine)
    except AdiError as error:
        return {"result": "refused", "reason": str(error).split("\n")[0]}
    drafted = accepted = 0
    for name, policy in policies(loaded).items():
        got = adi.generate(loaded, prompts()[0], policy, **LONG)
        if (found := _difference(wanted[0], got.token_ids)) is not None:
            return {"result": "wrong", "reason": f"{name}: other text from token {found} on"}
        drafted, accepted = drafted + got.counters.drafted, accepted + got.counters.accepted
        if name in ("ragged", "full"):
            both = adi.generate_batch(loaded, prompts(), policy, **LONG)
            if any(list(one.token_ids) != text for one, text in zip(both, wanted, strict=True)):
                return {"result": "wrong", "reason": f"{name}: another text in a batch"}
    return {"result": "exact", "drafted": drafted, "accepted": accepted, "different": len(set(wanted[0])), **_how(loaded)}


def _how(loaded: adi.Model) -> dict[str, Any]:
    split = getattr(loaded.backbone, "_split", None)
    if split is None:
        return {"row_invariant": loaded.backbone.spec.row_invariant}
    cache = loaded.backbone.new_cache()
    return {"memory": split.way.name.lower() if cache.held else "cut"}


def _loaded(model: Any, engine: str) -> adi.Model:
    if engine == "hf":
        return adi.load(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return adi.load(folder, backend="openvino", precision="fp32", threads=1)


def _difference(wanted: list[int], got: tuple[int, ...]) -> int | None:
    return next(
        (i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), None if len(wanted) == len(got) else 0
    )


def alone(family: str, engine: str, limit: int) -> dict[str, Any]:
    """The entry, from a process that may crash or take too long."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        signal.alarm(20 * limit)
        try:
            entry = measured(family, engine)
        except BaseException as error:  # foreign code raises what it likes, and one family must not end the run
            place = traceback.extract_tb(error.__traceback__)[-1]
            entry = {
                "result": "failed",
                "reason": f"{type(error).__name__}: {str(error).splitlines()[:1]} at {place.filename}:{place.lineno}",
            }
            if os.environ.get("TRACE"):
                traceback.print_exc()
        os.write(write, json.dumps(entry).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if said:
        return json.loads(said)  # type: ignore[no-any-return]
    return {
        "result": "failed",
        "reason": f"no answer within {limit} seconds of processor time" if os.WIFSIGNALED(status) else "the process ended",
    }


def code() -> str:
    """The last commit that changed what is measured."""
    asked = ["git", "log", "-1", "--format=%h", "--", "src/adi", "tools/families.py", "tools/family_settings.py"]
    return subprocess.run(asked, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _settled(done: dict[str, Any], options: Any, state: str) -> bool:
    if options.again:
        return done.get("code") == state
    return bool(done.get("result") == "exact" if options.open else done)


def page(known: dict[str, Any]) -> str:
    """``docs/families.md``."""
    exact = [sum(known[f].get(engine, {}).get("result") == "exact" for f in FAMILIES) for engine in ("hf", "compiled")]
    head = HEAD.format(
        version=t.__version__, families=len(FAMILIES), exact=exact[0], compiled=exact[1], measured=_measured_at(known)
    )
    columns = "transformers' modules | memory | compiled, fp32 |\n|---|---|---|---|---|"
    lines = [head, "## By name", "", f"| model | here | {columns}"]
    for name, families in NAMES.items():
        lines += [f"| {name} | {family} | {_cells(family, known.get(family, {}))} |" for family in families]
    lines += ["", "## All", "", f"| family | class | {columns}"]
    lines += [f"| {family} | {kind} | {_cells(family, known.get(family, {}))} |" for family, kind in TRIED.items()]
    return "\n".join(lines) + "\n"


def _measured_at(known: dict[str, Any]) -> str:
    """Of which states of the code the entries are."""
    states = [Counter(known[f][e].get("code") for f in TRIED if e in known.get(f, {})) for e in ("hf", "compiled")]
    state = max((states[0] + states[1]).items(), key=lambda item: (item[0] is not None, item[1]))[0]
    older = [found.total() - found[state] for found in states]
    rest = f", but for {older[0]} families on transformers' modules and {older[1]} compiled, which are of earlier commits"
    said = f"Measured at commit {state}, one thread{rest if any(older) else ''}. There biases and norms are drawn too: zeros"
    return "\n".join(textwrap.wrap(f"{said} hide what is left out.", 128))


def _cells(family: str, entry: dict[str, Any]) -> str:
    hf, compiled = entry.get("hf", {}), entry.get("compiled", {})
    ours = _cell(hf, WHY.get(family, ""))
    theirs = _cell(compiled, WHY_COMPILED.get(family, "")) if hf.get("result") == "exact" else "for the same reason not"
    return f"{ours} | {hf.get('memory', '')} | {theirs}"


def _cell(entry: dict[str, Any], why: str) -> str:
    if not entry:
        return why or "not tried"
    if entry["result"] == "exact":
        few = "" if entry["different"] > 1 else ", a text of one token again and again"
        few = few or ("" if entry["accepted"] else ", no draft accepted")
        return "exact" + few + ("; rows depend on how many share a pass" if entry.get("row_invariant") is False else "")
    return f"{entry['result'].replace('failed', 'not tried')}: {why or _short(entry['reason'])}"


def _short(reason: str) -> str:
    said = reason.partition("between blocks: ")[2] or reason.partition("to OpenVINO: ")[2] or reason
    return said.replace("|", "/").replace("\n", " ").rstrip(".")[:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--engine", default="hf", choices=("hf", "compiled"))
    parser.add_argument("--limit", type=int, default=120)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--open", action="store_true", help="again what is not exact yet")
    parser.add_argument("--reverse", action="store_true", help="from the end on, beside another run")
    parser.add_argument("--dry", action="store_true", help="show results and keep none")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="write the page and try nothing")
    options = parser.parse_args()
    if options.table:
        PAGE.write_text(page(json.loads(options.json.read_text())))
        return
    torch.set_num_threads(1)
    t.logging.set_verbosity_error()
    measured("llama", "hf")  # imports once what every process needs
    if options.engine == "compiled":  # so too, and no more than imports: what has threads is not forked
        for module in (
            "transformers.exporters.exporter_openvino",
            "openvino.tools.ovc.convert_impl",
            "adi.model.openvino.export",
        ):
            importlib.import_module(module)
    state = code()
    for family in options.families or [*TRIED][:: -1 if options.reverse else 1]:
        known = json.loads(options.json.read_text()) if options.json.exists() else {}  # others may run at once
        done = known.get(family, {}).get(options.engine, {})
        if (options.again or not options.families) and _settled(done, options, state):
            continue
        started = time.perf_counter()
        entry = {**alone(family, options.engine, options.limit), "code": state}
        print(
            f"{family:26}{time.perf_counter() - started:6.1f} s  {entry['result']:8}{ {**entry, 'result': ''} }"[:400],
            flush=True,
        )
        if not options.dry:
            known = json.loads(options.json.read_text()) if options.json.exists() else {}  # others may run at once
            known[family] = {**known.get(family, {}), options.engine: entry}
            options.json.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
