"""Run one of our modules in a fresh process and read the JSON object that it prints last."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable

from .machine import checkout_root


class ChildFailed(RuntimeError):
    """The process ended with an error; the message carries the end of what it wrote to stderr.

    `how` is its end in words; `code` its exit status, negative when a signal ended it, None when it ran out
    of time.
    """

    def __init__(self, command: list[str], how: str, code: int | None, said: list[str]):
        super().__init__("\n".join([f"{' '.join(command)} {how}:", *said]))
        self.how, self.code = how, code


def run_child(
    arguments: list[str],
    *,
    environment: dict[str, str] | None = None,
    timeout: float = 600,
    listen: Callable[[str], bool] | None = None,
) -> dict:
    """`python <arguments>` from the root of the checkout (from here when the package is installed).

    Arguments may name our modules as "{bench}.memory": {bench} becomes the package that this file is in.
    `listen` hears each line of stderr as it comes; lines for which it returns true are not part of errors.
    """
    root = checkout_root()
    package = __package__ if root is None else "bench"
    command = [sys.executable, *(a.replace("{bench}", package) for a in arguments)]
    last: deque[str] = deque(maxlen=8)
    late = threading.Event()
    with tempfile.TemporaryFile("w+") as stdout:
        process = subprocess.Popen(
            command,
            cwd=root,
            env={**os.environ, **(environment or {})},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

        def stop() -> None:
            late.set()
            process.kill()

        watch = threading.Timer(timeout, stop)
        watch.daemon = True
        watch.start()
        try:
            for line in process.stderr:
                if line.strip() and not (listen is not None and listen(line.rstrip("\n"))):
                    last.append(line.rstrip("\n"))
            code = process.wait()
        finally:  # Ctrl-C here: the child goes too
            watch.cancel()
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stderr.close()
        if code != 0:
            how = f"took more than {timeout:.0f} s" if late.is_set() else ended(code)
            raise ChildFailed(command[1:], how, None if late.is_set() else code, list(last))
        stdout.seek(0)
        return json.loads(stdout.read().strip().splitlines()[-1])


def ended(code: int) -> str:
    """An exit status in words: "ended with 3", "was ended by SIGSEGV"."""
    if code >= 0:
        return f"ended with {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
