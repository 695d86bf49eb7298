"""What a whole set of comparisons says: geometric means of the ratios, and where ours is slower.

The ratios are those of the comparisons: how many times as fast ours is, so above 1 ours is faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .peers import PEERS


def geometric_mean(ratios: Sequence[float]) -> float:
    """exp(mean(log r)): the only mean for which "a against b" and "b against a" are reciprocal."""
    if not ratios:
        raise ValueError("geometric_mean: no ratios")
    if min(ratios) <= 0:
        raise ValueError(f"geometric_mean: ratios must be positive, got {min(ratios)}")
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


def summarise(comparisons: Sequence[dict]) -> list[dict]:
    """One row per batch size and opponent (the groups of `Comparison.claims`, then each peer), as plain data.

    A row holds the geometric mean over the models for which both were timed, the smallest and largest ratio
    with their models, and `slower`: every model on which ours is not faster, worst first. `without` counts
    the models of that batch which have no ratio there.
    """
    rows = []
    for batch in sorted({c["batch"] for c in comparisons}):
        here = [c for c in comparisons if c["batch"] == batch]
        labels = dict.fromkeys(label for c in here for label in c["claims"])
        keys = [key for key in PEERS if key != "ours" and any(key in c["peers"] for c in here)]
        for label in labels:
            found = {c["model"]: c["claims"][label] for c in here if label in c["claims"]}
            rows.append(_row(batch, label, len(here), {m: (r["ratio"], r["peer"]) for m, r in found.items()}))
        for key in keys:
            found = {c["model"]: (c["peers"].get(key) or {}).get("ours_is_faster_by") for c in here}
            ratios = {m: (ratio, key) for m, ratio in found.items() if ratio is not None}
            if ratios:
                rows.append(_row(batch, PEERS[key].name, len(here), ratios))
    return rows


def _row(batch: int, against: str, models: int, ratios: dict[str, tuple[float, str]]) -> dict:
    ordered = sorted((ratio, model, peer) for model, (ratio, peer) in ratios.items())
    return {
        "batch": batch,
        "against": against,
        "models": len(ordered),
        "without": models - len(ordered),
        "geometric_mean": round(geometric_mean([r for r, _, _ in ordered]), 4),
        "smallest": _extreme(ordered[0]),
        "largest": _extreme(ordered[-1]),
        "faster": sum(r > 1 for r, _, _ in ordered),
        "slower": [_extreme(entry) for entry in ordered if entry[0] <= 1],
    }


def _extreme(entry: tuple[float, str, str]) -> dict:
    ratio, model, peer = entry
    return {"model": model, "ratio": round(ratio, 4), "peer": peer}


TOO_MANY = 1 / 3  # share of disturbed rounds above which a row should be measured again


def disturbed(comparisons: Sequence[dict]) -> list[tuple[str, int]]:
    """Model and batch size of the rows that were measured while the machine was busy with something else."""
    return [
        (c["model"], c["batch"])
        for c in comparisons
        if c["timing"] and c["timing"]["disturbed_share"] > TOO_MANY
    ]


def disturbed_line(comparisons: Sequence[dict]) -> str | None:
    """A sentence about these rows, or None when there are none."""
    found = disturbed(comparisons)
    if not found:
        return None
    named = ", ".join(f"{model} batch {batch}" for model, batch in found)
    return (
        f"not to be trusted, more than a third of the rounds disturbed, in {len(found)} of {len(comparisons)}"
        f" rows: {named}; --resume FILE --redo-disturbed measures them again"
    )


def summary_cells(row: dict) -> list[str]:
    """The cells of one row, the same for the terminal and for Markdown."""
    ends = [f"{row[end]['ratio']:.2f}x {row[end]['model']}" for end in ("smallest", "largest")]
    counts = [str(row["models"]), f"{row['geometric_mean']:.2f}x", *ends, str(row["faster"])]
    return [str(row["batch"]), row["against"], *counts, str(len(row["slower"]))]


HEAD = ["batch", "against", "models", "geometric mean", "smallest", "largest", "ours faster", "ours slower"]


def losses(rows: Sequence[dict], best: str) -> list[str]:
    """A sentence per batch about the models on which the best peer is at least as fast as ours."""
    lines = []
    for row in rows:
        if row["against"] == best:
            lost = ", ".join(
                f"{e['model']} {e['ratio']:.2f}x ({PEERS[e['peer']].name})" for e in row["slower"]
            )
            lines.append(
                f"batch {row['batch']}: slower than {best} on {len(row['slower'])} of {row['models']} models"
                + (f": {lost}" if lost else "")
                + (f"; {row['without']} without a ratio" if row["without"] else "")
            )
    return lines
