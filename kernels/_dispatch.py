"""Which implementation of an op runs: ordered candidates, fastest first, each of which can say no.

    run(op, args, backend)   the first candidate that accepts; a backend asked for by name must not refuse
    explain(name, ...)       the whole list with what each candidate says about these arguments
    backend(name)            a context manager: `with backend("reference"): ...`
    FB_BACKEND               the same for a whole process

A candidate belongs to a family: "native" (compiled kernels for the CPU), "gpu" (kernels for training on a
GPU) or "reference" (plain PyTorch). A backend may be named by family or by candidate. Nothing here catches an
exception: what fails in a kernel is shown, not replaced by the reference.
"""

import os
import threading
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling as is_compiling  # not true in other threads during an export

__all__ = [
    "Candidate",
    "Explanation",
    "Op",
    "backend",
    "current_backend",
    "explain",
    "ops",
    "reference",
    "register",
]

FAMILIES = ("native", "gpu", "reference")
_EXPECTED = "'auto', 'native', 'gpu' or 'reference'"


def _always_fine(*_) -> None:
    return None


@dataclass(frozen=True)
class Candidate:
    """One implementation. `refuse`, `run` and `decline` take the prepared arguments of their op.

    refuse: why it cannot run these arguments, or None.
    decline: why it is not worth running, or None; the automatic choice passes over it, a call by name still
        runs it.
    """

    name: str
    family: str
    refuse: Callable[..., str | None]
    run: Callable[..., Tensor]
    decline: Callable[..., str | None] = _always_fine


@dataclass(frozen=True)
class Op:
    """An op: its name, the check that turns the caller's arguments into prepared ones, and its candidates."""

    name: str
    prepare: Callable[..., tuple[Any, ...]]
    candidates: tuple[Candidate, ...]


_OPS: dict[str, Op] = {}


def register(name: str, prepare: Callable[..., tuple[Any, ...]], *candidates: Candidate) -> Op:
    """Make an op known to `explain`, to tests and to benchmarks. The last candidate accepts everything."""
    if name in _OPS:
        raise ValueError(f"op {name!r} is registered twice")
    if candidates[-1].family != "reference":
        raise ValueError(f"op {name!r}: the last candidate must be the reference")
    _OPS[name] = Op(name, prepare, candidates)
    return _OPS[name]


def ops() -> dict[str, Op]:
    """All registered ops by name."""
    return dict(_OPS)


def reference(formula: Callable[..., Tensor]) -> Candidate:
    """The candidate that never refuses: the formula in plain PyTorch."""
    return Candidate("reference", "reference", _always_fine, formula)


# ---- the chosen backend ----

_chosen: ContextVar[str | None] = ContextVar("fast_backbones_backend", default=None)
# Dynamo cannot read a context variable but guards a global: compiled code sees the latest choice of any
# thread.
_chosen_for_tracing: str | None = None
_live: list["_Choice"] = []  # the choices now in force in any thread, latest last
_lock = threading.Lock()
_environment: str = os.environ.get("FB_BACKEND", "auto")


@dataclass(frozen=True, eq=False)
class _Choice:
    name: str
    token: Token


def current_backend() -> str:
    """The innermost `backend` of this thread, else FB_BACKEND, else "auto"."""
    name = _chosen_for_tracing if is_compiling() else _chosen.get()
    if name is not None:
        return name
    if _environment != "auto" and _environment not in FAMILIES:
        raise ValueError(f"FB_BACKEND is {_environment!r}, expected {_EXPECTED}")
    return _environment


class backend:
    """Pin the family of implementations for the ops called inside, in this thread.

        with backend("reference"): ...    plain PyTorch
        with backend("native"): ...       compiled kernels; what they refuse raises RuntimeError
        with backend("gpu"): ...          the kernels for training on a GPU, likewise
        with backend("auto"): ...         the fastest that accepts, whatever FB_BACKEND says

    Nests, and other threads keep their own choice. A function under `torch.compile` follows the latest choice
    made in any thread, because a compiled function cannot look at a thread's context.
    """

    def __init__(self, name: str):
        if name != "auto" and name not in FAMILIES:
            raise ValueError(f"backend is {name!r}, expected {_EXPECTED}")
        self._name = name
        self._entered: list[Any] = []

    def __enter__(self) -> "backend":
        global _chosen_for_tracing
        if is_compiling():
            self._entered.append(_chosen_for_tracing)
            _chosen_for_tracing = self._name
        else:
            choice = _Choice(self._name, _chosen.set(self._name))
            self._entered.append(choice)
            with _lock:
                _live.append(choice)
                _chosen_for_tracing = self._name
        return self

    def __exit__(self, *_: object) -> None:
        global _chosen_for_tracing
        outer = self._entered.pop()
        if is_compiling():
            _chosen_for_tracing = outer
        else:
            _chosen.reset(outer.token)
            with _lock:
                _live.remove(outer)
                _chosen_for_tracing = _live[-1].name if _live else None


# ---- choosing ----


def run(op: Op, args: tuple[Any, ...], name: str | None = None) -> Tensor:
    """Run the first candidate that accepts the prepared arguments, of all or of the named backend."""
    if name is None:
        name = current_backend()
    if name == "auto":
        for candidate in op.candidates:
            if candidate.refuse(*args) is None and candidate.decline(*args) is None:
                return candidate.run(*args)
        raise AssertionError(f"{op.name}: the reference refused")
    if name == "reference":
        return op.candidates[-1].run(*args)
    # A family runs its best candidate that is worth it, else its first that can; a candidate runs when it
    # can.
    able = None
    refusals = []
    for candidate in op.candidates:
        if name in (candidate.name, candidate.family):
            reason = candidate.refuse(*args)
            if reason is not None:
                refusals.append(f"{candidate.name}: {reason}")
            elif candidate.decline(*args) is None:
                return candidate.run(*args)
            elif able is None:
                able = candidate
    if able is not None:
        return able.run(*args)
    if not refusals and name in FAMILIES:
        refusals.append("it has no such kernel")
    if not refusals:
        known = ", ".join(sorted({"auto", *FAMILIES, *(candidate.name for candidate in op.candidates)}))
        raise ValueError(f"{op.name}: backend is {name!r}, expected one of {known}")
    raise RuntimeError(
        f"{op.name}: backend {name!r} was asked for by name and refuses; " + "; ".join(refusals)
    )


# ---- explaining ----


@dataclass(frozen=True)
class Verdict:
    """What one candidate says: it refuses, or declines, or neither."""

    name: str
    family: str
    refusal: str | None
    declined: str | None


@dataclass(frozen=True)
class Explanation:
    """What every candidate of an op says about some arguments; `str()` prints the list."""

    op: str
    backend: str
    chosen: str | None
    candidates: tuple[Verdict, ...]

    def __str__(self) -> str:
        lines = [f"{self.op} (backend {self.backend})"]
        for verdict in self.candidates:
            if verdict.name == self.chosen:
                text = "runs"
            elif verdict.refusal is not None:
                text = f"refuses: {verdict.refusal}"
            elif verdict.declined is not None:
                text = f"declines: {verdict.declined}"
            else:
                text = "accepts, not chosen"
            label = verdict.name if verdict.name == verdict.family else f"{verdict.name} ({verdict.family})"
            lines.append(f"  {label:<22}{text}")
        return "\n".join(lines)


def explain(
    op: str | Callable[..., Any], *args: Any, backend: str | None = None, **kwargs: Any
) -> Explanation:
    """What each candidate says about a call, without running it.

    Args:
        op: the name of an op, or its public function.
        *args, **kwargs, backend: the arguments of the call.
    Raises: what the call itself would raise for bad arguments; ValueError for an unknown op.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _OPS:
        raise ValueError(f"op is {name!r}, expected one of {', '.join(sorted(_OPS))}")
    entry = _OPS[name]
    prepared = entry.prepare(*args, **kwargs)
    pinned = current_backend() if backend is None else backend
    verdicts = tuple(
        Verdict(c.name, c.family, c.refuse(*prepared), c.decline(*prepared)) for c in entry.candidates
    )
    able = [v for v in verdicts if v.refusal is None and pinned in ("auto", v.name, v.family)]
    worth = [v for v in able if v.declined is None]
    chosen = (worth or able or [None])[0]
    return Explanation(name, pinned, chosen and chosen.name, verdicts)
