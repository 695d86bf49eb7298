"""Result files: a JSON file with everything, and a Markdown file to read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

NUMBERS = re.compile(r"\[\s+([-+.\de]+(?:,\s+[-+.\de]+)*)\s+\]")  # a list of numbers over several lines


def as_json(results: dict) -> str:
    """Indented, but with a list of numbers in one line: the timed calls of a round are hundreds."""
    text = json.dumps(results, indent=1)
    return NUMBERS.sub(lambda found: "[" + re.sub(r",\s+", ", ", found[1]) + "]", text) + "\n"


def write_results(results: dict, markdown: str, folder: Path, name: str) -> Path:
    """Both files, each by rename, so that a reader never sees half a file. Returns the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    for ending, text in ((".json", as_json(results)), (".md", markdown)):
        draft = folder / f".{name}{ending}.part"
        draft.write_text(text)
        os.replace(draft, folder / f"{name}{ending}")
    return folder / f"{name}.json"
