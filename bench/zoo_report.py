"""The zoo as Markdown: one row per network, then what is left to PyTorch, summed over the networks."""

from __future__ import annotations

from collections import Counter

from .machine import headline
from .report import ms
from .summary import geometric_mean

SPEED = {"eager": "eager NCHW", "channels_last": "eager channels_last", "compile": "torch.compile"}


def markdown(results: dict) -> str:
    """The whole report of one result file."""
    rows, failures = results["rows"], results["failures"]
    versions = ", ".join(f"{name} {version}" for name, version in results["libraries"].items())
    lines = [f"# {headline(results['machine'])}", "", f"`{results['command']}`, {versions}", ""]
    lines += [*summary(rows), ""]
    lines += ["Errors are max / rms against float64, relative to the rms of the output.", ""]
    lines += [*coverage_table(rows, failures), ""]
    lines += [*left_table(rows), ""]
    timed = [row for row in rows if row.get("speed")]
    if timed:
        lines += ["Median milliseconds of a forward; ratios are medians over interleaved rounds.", ""]
        lines += [*speed_table(timed), ""]
    return "\n".join(lines).rstrip() + "\n"


def summary(rows: list[dict]) -> list[str]:
    """The table in sentences."""
    planned = [row for row in rows if row["why_not"] is None]
    whole = [row for row in planned if not row["left"]]
    wrong = [row["model"] for row in rows if not row["parity_2x"]]
    lines = [
        f"- {len(rows)} networks; {len(planned)} have a plan, {len(whole)} of these leave nothing to PyTorch",
        f"- {len(rows) - len(wrong)} keep the 2x rule" + (f"; not {', '.join(wrong)}" if wrong else ""),
    ]
    steps = sum(row["steps"] for row in planned)
    if steps:
        native = sum(row["native_steps"] for row in planned)
        least = min(planned, key=lambda row: row["native_bytes"])
        lines.append(
            f"- native: {native / steps:.1%} of {steps} steps; of the bytes, on average"
            f" {sum(row['native_bytes'] for row in planned) / len(planned):.1%} of a network,"
            f" at least {least['native_bytes']:.0%} ({least['model']})"
        )
    for key, name in SPEED.items():
        ratios = [ratio for row in rows if row.get("speed") and (ratio := faster(row, key)) is not None]
        if ratios:
            lines.append(f"- {geometric_mean(ratios):.2f}x as fast as {name}, over {len(ratios)} networks")
    return lines


def coverage_table(rows: list[dict], failures: list[dict]) -> list[str]:
    head = ("network", "image", "GMACs", "2x rule", "ours", "eager", "steps", "native", "MACs", "bytes")
    lines = table_head((*head, "left to PyTorch"))
    for row in rows:
        first = (row["model"], str(row["input"][-1]), f"{row['gmacs']:.2f}")
        second = ("yes" if row["parity_2x"] else "**no**", both(row["error"]), both(row["eager_error"]))
        if row["why_not"] is not None:
            third = ("", "", "", "", f"no plan: {row['why_not']}")
        else:
            shares = (share(row["native_macs"]), share(row["native_bytes"]))
            third = (str(row["steps"]), str(row["native_steps"]), *shares, counted(row["left"]))
        lines.append(table_row((*first, *second, *third)))
    for failure in failures:
        sentence = " ".join(failure["sentence"].split()).replace("|", "/")
        lines.append(table_row((failure["model"], *("",) * 9, f"failed: {sentence[-300:]}")))
    return lines


def left_table(rows: list[dict]) -> list[str]:
    """Operations that no kernel took, the most frequent first."""
    times: Counter[str] = Counter()
    networks: Counter[str] = Counter()
    words: dict[str, str] = {}
    for row in rows:
        times.update(row.get("left", {}))
        networks.update(row.get("left", {}).keys())
        words |= row.get("declined", {}) | words
    if not times:
        return ["Nothing is left to PyTorch."]
    lines = table_head(("left to PyTorch", "times", "networks", "what was declined"))
    return lines + [
        table_row((name, str(count), str(networks[name]), words[name])) for name, count in times.most_common()
    ]


def speed_table(rows: list[dict]) -> list[str]:
    names = [*SPEED.values(), "fast_backbones"]
    lines = table_head(("network", *names, *(f"vs {name}" for name in SPEED.values()), "native time"))
    for row in rows:
        peers = row["speed"]["peers"]
        times = [
            ms(peers[key]["median_ms"]) if peers[key]["status"] == "timed" else peers[key]["status"]
            for key in (*SPEED, "ours")
        ]
        ratios = [f"{ratio:.2f}x" if (ratio := faster(row, key)) is not None else "" for key in SPEED]
        lines.append(table_row((row["model"], *times, *ratios, share(row["native_time"]))))
    return lines


def faster(row: dict, key: str) -> float | None:
    """How many times as fast ours is as this peer."""
    return row["speed"]["peers"].get(key, {}).get("ours_is_faster_by")


def both(found: dict | None) -> str:
    return "" if found is None else f"{found['max']:.1e} / {found['rms']:.1e}"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}" if value in (0, 1) else f"{value:.1%}"


def counted(left: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in left.items())


def table_head(cells: tuple[str, ...]) -> list[str]:
    return [table_row(cells), "|" + "---|" * len(cells)]


def table_row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"
