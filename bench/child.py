"""Run one of our modules in a fresh process and read the JSON object that it prints last."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from .machine import checkout_root


class ChildFailed(RuntimeError):
    """The process ended with an error; the message carries the end of what it wrote to stderr."""


def run_child(
    arguments: list[str], *, environment: dict[str, str] | None = None, timeout: float = 600
) -> dict:
    """`python <arguments>` from the root of the checkout (from here when the package is installed).

    Arguments may name our modules as "{bench}.memory": {bench} becomes the package that this file is in.
    """
    root = checkout_root()
    package = __package__ if root is None else "bench"
    command = [sys.executable, *(a.replace("{bench}", package) for a in arguments)]
    done = subprocess.run(
        command,
        cwd=root,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise ChildFailed(f"{' '.join(command[1:])} ended with {done.returncode}:\n{tail}")
    return json.loads(done.stdout.strip().splitlines()[-1])
