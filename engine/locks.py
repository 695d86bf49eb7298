"""Locks that a forked child gets anew: another thread of the parent may have held them at the fork."""

from __future__ import annotations

import os
import threading
from typing import Any


class ForkSafeLock:
    """A reentrant lock; `with lock:`."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self._lock.release()
