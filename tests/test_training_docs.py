"""The code of docs/training.md runs as it stands, and the page knows every public name."""

import re

from helpers import ROOT

from fast_backbones import training

PAGE = (ROOT / "docs" / "training.md").read_text()


def test_code_blocks_run_in_order():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/training.md", "exec"), names)


def test_the_page_names_every_part():
    wanted = {name for name in training.__all__ if not name.isupper() and name != "Recipe"}
    assert not [name for name in wanted if name not in PAGE]
