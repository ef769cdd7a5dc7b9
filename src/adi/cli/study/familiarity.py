"""``adi study familiarity``: does a real model, untrained, decide what is familiar at shallower depth?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from adi.cli.shared.options import (
    AnswerTokensOption,
    EngineOptions,
    JsonFileOption,
    LimitOption,
    ModelArgument,
    PromptsOption,
    chosen_prompts,
    opened_history,
    option,
)
from adi.cli.shared.output import command_line, err, out, say, table
from adi.files import require_writable, write_json
from adi.progress import Reporter


def familiarity(
    model: ModelArgument = "smollm2-135m",
    prompts: PromptsOption = "bench",
    limit: LimitOption = 24,
    max_new_tokens: AnswerTokensOption = 48,
    history: Annotated[
        Path | None, option("--history", metavar="FILE", help="Count n-grams in these past outputs, not in the other answers.")
    ] = None,
    json_out: JsonFileOption = None,
    *,
    engine: EngineOptions,
) -> None:
    """Depth at which a model's own head settles, against repetition, n-gram counts and word order, at equal surprise.

    The model answers the prompts; each answer is then read four times in a row, and once with its tokens shuffled.
    """
    require_writable(json_out)
    items, loaded = chosen_prompts(prompts, limit), engine.load(model)
    from adi.measure.exposure.familiarity import familiarity as measure
    from adi.measure.provenance import provenance

    known = opened_history(loaded, history)
    past = () if known is None else known.newest(known.info().sequences)
    with Reporter(err(), "answers") as progress:
        found = measure(loaded, [item.text_or_ids for item in items], max_new_tokens, past, progress)
    if json_out is not None:
        about = {**provenance(command_line(), items), "model": model}
        write_json(json_out, {"format": "adi-familiarity", "version": 1, **about, **found})
    _show(found)


def _show(found: dict[str, Any]) -> None:
    names = {
        "repetition": "a doubling of times in this context",
        "count": "a doubling of 1 + n-gram count elsewhere",
        "own_order": "its own order against shuffled",
    }
    rows = []
    for name, what in names.items():
        if (one := found[name]) is not None:
            low, high = one["interval"]
            rows.append((what, f"{one['slope']:+.3f} ({low:+.3f} to {high:+.3f})", f"{one['with_nothing_held_equal']:+.3f}"))
    title = f"Depth, in blocks of {found['layers']}, at equal surprise, entropy, frequency and place"
    out().print(table(title, ("blocks for", "slope", "with nothing held equal"), rows, left=("blocks for",)))
    for k, row in enumerate(found["by_mention"], 1):
        say(out(), f"read {k}: depth {row['depth']:.2f}, surprise {row['surprise']:.2f} nats")
    say(out(), f"shuffled: depth {found['shuffled']['depth']:.2f}, surprise {found['shuffled']['surprise']:.2f} nats")
