"""What the rows of `bench.train` say: tables in Markdown, geometric means, losses beside wins.

Ratios of time are how many times as fast ours is, so above 1 ours is faster; ratios of memory are ours over
theirs, so below 1 ours needs less. "best eager" is the faster of the two layouts, in each model anew.
"""

from __future__ import annotations

from .machine import headline
from .summary import TOO_MANY, geometric_mean

EAGER = ("channels_last", "eager")
TUNED = ", tuned malloc"
# Heading of a column, our stack, the stacks whose fastest it is compared with.
CLAIMS = {
    "vs best eager": ("ours", EAGER),
    "vs best eager, both tuned": ("ours" + TUNED, tuple(key + TUNED for key in EAGER)),
    "vs best eager, only eager tuned": ("ours", tuple(key + TUNED for key in EAGER)),
    "vs reference": ("ours", ("reference",)),
    "vs torch.compile": ("ours", ("compile",)),
}
MEMORY, MEMORY_TUNED = "memory over eager's", "memory over eager's, both tuned"


def timed(row: dict) -> dict[str, dict]:
    return {e["key"]: e for e in row["stacks"] if e["status"] == "timed"}


def claims(row: dict) -> dict[str, tuple[float, str]]:
    """Column -> (ratio of time, the stack it is against), where both were timed."""
    entries, found = timed(row), {}
    for column, (ours, against) in CLAIMS.items():
        there = [key for key in against if key in entries]
        if ours in entries and there:
            best = min(there, key=lambda key: entries[key]["median_ms"])
            field = "ours_is_faster_by" if ours == "ours" else "tuned_ours_is_faster_by"
            found[column] = (entries[best][field], best)
    return found


def memory_claims(row: dict) -> dict[str, tuple[float, str]]:
    """Column -> (our peak over the smaller of eager's two, that layout)."""
    entries, found = timed(row), {}
    for column, ending in ((MEMORY, ""), (MEMORY_TUNED, TUNED)):
        there = [key + ending for key in EAGER if key + ending in entries]
        if "ours" + ending in entries and there:
            least = min(there, key=lambda key: entries[key]["peak_mib"])
            ratio = entries["ours" + ending]["peak_mib"] / max(entries[least]["peak_mib"], 0.1)
            found[column] = (ratio, least)
    return found


def summarise(rows: list[dict]) -> list[dict]:
    """For each column its geometric mean over the models, and the models on which ours is not ahead."""
    found = []
    for kind, of in (("time", claims), ("memory", memory_claims)):
        cells = {row["model"]: of(row) for row in rows}
        for column in dict.fromkeys(c for row in cells.values() for c in row):
            ratios = {model: row[column] for model, row in cells.items() if column in row}
            behind = [
                {"model": model, "ratio": round(ratio, 4), "stack": stack}
                for model, (ratio, stack) in ratios.items()
                if (ratio <= 1 if kind == "time" else ratio >= 1)
            ]
            mean = geometric_mean([ratio for ratio, _ in ratios.values()])
            entry = {"kind": kind, "against": column, "models": len(ratios)}
            found.append(entry | {"geometric_mean": round(mean, 4), "behind": behind})
    return found


def ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def model_lines(row: dict) -> list[str]:
    """One line per stack, and what the table alone does not say."""
    head = [
        "stack",
        "ms a step",
        "middle half",
        "images/s",
        "peak MiB",
        "MiB of a step",
        "page faults",
    ]
    head += ["error of loss", "of gradients, worst (middle)", "ours is faster by"]
    lines, notes = [], []
    for e in row["stacks"]:
        name = e["name"] + (TUNED if e["malloc"] == "tuned" else "")
        error = e.get("error") or {}
        if error.get("gradients") is not None:
            worst, middle = error["gradients"], error["gradients_middle"]
            errors = [f"{error['loss']:.1e}", f"{worst:.1e} ({middle:.1e})"]
        else:
            errors = ["", ""]
        if e["status"] != "timed":
            lines.append([name, e["status"], *[""] * 5, *errors, ""])
            notes.append(f"{name} {e['status']}: {e['sentence'].splitlines()[-1]}")
            continue
        low, high = e["quartiles_ms"]
        ours = "ours" if e["malloc"] == "default" else "ours" + TUNED
        ratio = e.get("ours_is_faster_by" if e["malloc"] == "default" else "tuned_ours_is_faster_by")
        cells = [ms(e["median_ms"]), f"{ms(low)} .. {ms(high)}", f"{row['batch'] / e['median_ms'] * 1e3:.1f}"]
        cells += [
            f"{e['peak_mib']:.0f}",
            "" if e["step_mib"] is None else f"{e['step_mib']:.0f}",
            f"{e['faults']:.0f}",
            *errors,
        ]
        lines.append([name, *cells, f"{ratio:.2f}x" if ratio is not None and e["key"] != ours else ""])
    sources = {e["settings"]["modules"] for e in row["stacks"] if e["stack"] in EAGER and "settings" in e}
    notes += [f"eager: modules of {', '.join(sorted(sources))}"] if sources else []
    notes.append(f"PyTorch's own gradients: worst {row['own']['gradients']:.1e} against float64")
    if row["timing"] is not None:
        timing = row["timing"]
        notes.append(f"{len(timing['rounds'])} rounds, {timing['disturbed_share']:.0%} disturbed")
    shape = "x".join(map(str, row["shape"]))
    return [f"### {row['model']}, {shape}", "", *table(head, lines), "", *(f"- {note}" for note in notes), ""]


def summary_lines(results: dict) -> list[str]:
    """The table over the models, with a line of geometric means, and the models on which ours is behind."""
    rows, columns = results["rows"], [entry["against"] for entry in results["summary"]]
    cells = []
    for row in rows:
        found = claims(row) | memory_claims(row)
        ours = timed(row).get("ours") or timed(row).get("ours" + TUNED)
        share = row["timing"]["disturbed_share"] if row["timing"] else 0.0
        ratios = [f"{found[c][0]:.2f}x" if c in found else "" for c in columns]
        cells.append([row["model"], ms(ours["median_ms"]) if ours else "", *ratios, f"{share:.0%}"])
    means = [f"**{entry['geometric_mean']:.2f}x**" for entry in results["summary"]]
    cells += [["geometric mean", "", *means, ""]] if rows and columns else []
    lines = table(["model", "ours, ms", *columns, "disturbed"], cells) if rows else []
    for entry in results["summary"]:
        behind = ", ".join(f"{e['model']} {e['ratio']:.2f}x ({e['stack']})" for e in entry["behind"])
        word = "not faster" if entry["kind"] == "time" else "not less"
        count = f"{len(entry['behind'])} of {entry['models']}"
        lines += ["", f"{entry['against']}: {word} on {count} models" + (f": {behind}" if behind else "")]
    unquiet = [r["model"] for r in rows if r["timing"] and r["timing"]["disturbed_share"] > TOO_MANY]
    if unquiet:
        lines += ["", f"not to be trusted, more than a third of the rounds disturbed: {', '.join(unquiet)}"]
    return lines + [f"\nfailed: {f['model']}: {f['sentence']}" for f in results["failures"]]


def markdown(results: dict) -> str:
    """The whole file."""
    options = results["options"]
    dtype = options.get("dtype", "float32")
    dtype += "" if dtype == "float32" else " under autocast"
    how = (
        f"A training step (forward, cross entropy, backward, SGD with momentum), {dtype} on "
        f"{options.get('device', 'cpu')}; medians over "
        f"{options['rounds']} turns of each stack, batch {options['batch']}, {options['threads']} threads. "
        "Ratios of time are how many times as fast ours is, ratios of memory ours over the smaller of both "
        "eager layouts."
    )
    head = ["# Training steps", "", headline(results["machine"]), "", f"`{results['command']}`", "", how, ""]
    rows = [line for row in results["rows"] for line in model_lines(row)]
    return "\n".join([*head, *summary_lines(results), "", *rows]).rstrip() + "\n"
