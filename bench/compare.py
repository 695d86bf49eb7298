"""One model, one input, several peers: check the numbers first, then time them in turns.

    comparison = compare(model, x, make_peers(threads=2), budget=20)
    comparison.median_ms("ours"); comparison.ratio("onnxruntime"); comparison.as_dict()

Errors are relative to the root mean square of the float64 reference, over all elements of all outputs:
max = max|y - r| / rms(r) and rms = rms(y - r) / rms(r). A peer whose rms error is above that of the precision
or which returns another shape or a NaN gets no time. Ours has the stricter rule of the parity suite too: both
errors at most twice those of PyTorch's own run, plus a few epsilons (more at "high": see precision.py).
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .exact import float64
from .peer import Peer, Refused, as_list, plain
from .precision import PRECISIONS, Precision
from .timing import Candidate, NoiseGuard, Session, measure

BEST = "the best peer"
# "a few epsilons": what remains when PyTorch's own run happens to be almost exact
SLACK = 4 * torch.finfo(torch.float32).eps

Tell = Callable[[float, str], None]


@dataclass(frozen=True)
class Error:
    """Error against float64, relative to the rms of the reference."""

    max: float
    rms: float

    def within(self, factor: float, own: Error) -> bool:
        """As accurate as `own` up to this factor; with 2, the 2x rule."""
        return self.max <= factor * own.max + SLACK and self.rms <= factor * own.rms + SLACK

    def __str__(self) -> str:
        return f"max {self.max:.1e}, rms {self.rms:.1e}"


def error(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> Error:
    """Error of the outputs against float64 ones of the same shapes; infinite when an output is not finite."""
    largest = squares = reference = 0.0
    count = 0
    for y, r in zip(outputs, exact, strict=True):
        difference = y.double() - r
        largest = max(largest, difference.abs().nan_to_num(nan=math.inf).max().item() if r.numel() else 0.0)
        squares += difference.square().sum().item()
        reference += r.square().sum().item()
        count += r.numel()
    scale = math.sqrt(reference / count) if count and reference > 0 else 1.0
    rms = math.sqrt(squares / count) / scale if count else 0.0
    return Error(largest / scale, rms if math.isfinite(rms) else math.inf)


def exact_outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The plain modules in float64."""
    module = plain(model).double()
    with torch.inference_mode():
        return as_list(float64(module, x))


def eager_error(model: nn.Module, x: Tensor, exact: Sequence[Tensor]) -> Error:
    """Error of PyTorch's own run (NCHW), in the type of the model and at the highest precision."""
    with torch.inference_mode():
        return error(as_list(plain(model)(x.contiguous())), exact)


@dataclass
class Entry:
    """What became of one peer: timed, absent, refused, failed or wrong; `sentence` says why no time."""

    key: str
    name: str
    version: str
    settings: dict[str, str]
    status: str
    sentence: str = ""
    error: Error | None = None
    prepare_seconds: float | None = None

    @property
    def timed(self) -> bool:
        return self.status == "timed"


@dataclass
class Comparison:
    """All peers on one model and input."""

    batch: int
    entries: list[Entry]
    own: Error  # PyTorch's own run against float64
    session: Session | None
    parity: bool | None = None  # whether ours is exact enough for its precision; None when ours did not run
    logits: Tensor | None = field(default=None, repr=False)  # ours, or the first peer's when ours did not run

    def entry(self, key: str) -> Entry | None:
        return next((e for e in self.entries if e.key == key), None)

    @property
    def timed(self) -> list[str]:
        return [e.key for e in self.entries if e.timed]

    def median_ms(self, key: str) -> float:
        return self.session.median(key) * 1e3

    def quartiles_ms(self, key: str) -> tuple[float, float]:
        low, high = self.session.quartiles(key)
        return low * 1e3, high * 1e3

    def best(self, keys: Sequence[str]) -> str | None:
        """The fastest of these by median, or None when none of them was timed."""
        timed = [k for k in keys if k in self.timed]
        return self.session.fastest(timed) if timed else None

    def ratio(self, key: str, ours: str = "ours") -> float | None:
        """How many times as fast `ours` is as the peer: per round, then the median over rounds."""
        if self.session is None or key not in self.timed or ours not in self.timed:
            return None
        return self.session.ratio(key, ours)

    def claims(self) -> dict[str, tuple[str, float]]:
        """The ratios that matter: against eager's better layout, torch.compile's better mode, the better of
        each pair of runtimes, the best of all.

        Each is (key of the peer that was best in its group, ratio); groups with nothing timed are left out.
        """
        groups = {
            "eager, better layout": ["eager", "channels_last"],
            "torch.compile": ["compile", "autotune"],
            "ONNX Runtime or OpenVINO, the better": ["onnxruntime", "openvino"],
            "ncnn or MNN, the better": ["ncnn", "mnn"],
            BEST: [e.key for e in self.entries if e.key != "ours"],
        }
        found = {}
        for label, keys in groups.items():
            best = self.best(keys)
            ratio = self.ratio(best) if best is not None else None
            if ratio is not None:
                found[label] = (best, ratio)
        return found

    def as_dict(self) -> dict[str, object]:
        entries = {}
        for e in self.entries:
            entries[e.key] = row = {
                "name": e.name,
                "version": e.version,
                "settings": e.settings,
                "status": e.status,
                "error": {"max": e.error.max, "rms": e.error.rms} if e.error else None,
                "prepare_seconds": e.prepare_seconds,
            }
            if e.sentence:
                row["sentence"] = e.sentence
            if e.timed:
                low, high = self.quartiles_ms(e.key)
                row |= {
                    "median_ms": round(self.median_ms(e.key), 4),
                    "quartiles_ms": [round(low, 4), round(high, 4)],
                    "ours_is_faster_by": self.ratio(e.key) if e.key != "ours" else None,
                }
        return {
            "batch": self.batch,
            "eager_error": {"max": self.own.max, "rms": self.own.rms},
            "parity_2x": self.parity,
            "peers": entries,
            "claims": {label: {"peer": k, "ratio": ratio} for label, (k, ratio) in self.claims().items()},
            "timing": self.session.as_dict() if self.session else None,
        }

    @classmethod
    def from_dict(cls, data: dict) -> Comparison:
        """The comparison that `as_dict` wrote, without logits."""
        entries = [
            Entry(
                key,
                row["name"],
                row["version"],
                row["settings"],
                row["status"],
                row.get("sentence", ""),
                Error(**row["error"]) if row["error"] else None,
                row["prepare_seconds"],
            )
            for key, row in data["peers"].items()
        ]
        session = Session.from_dict(data["timing"]) if data["timing"] else None
        return cls(data["batch"], entries, Error(**data["eager_error"]), session, data["parity_2x"])


def check(
    peer: Peer, model: nn.Module, x: Tensor, exact: Sequence[Tensor], own: Error, precision: Precision
) -> tuple[Entry, object]:
    """Prepare one peer and compare its output with float64: (what became of it, its call or None).

    Another stack's exception becomes its line in the table, with the text; ours is a bug and is raised. What
    is compared is the second output: a stack that spoils its input in the first call is wrong.
    """
    entry = Entry(peer.key, peer.name, peer.version(), peer.settings(), "absent")
    entry.sentence = peer.missing() or ""
    if entry.sentence:
        return entry, None
    try:
        start = time.perf_counter()
        call = peer.prepare(model, x)
        entry.prepare_seconds = round(time.perf_counter() - start, 3)
        entry.settings = peer.settings()  # with what was chosen meanwhile
        call()
        outputs = call()
    except Refused as refusal:
        entry.status, entry.sentence = "refused", str(refusal)
        return entry, None
    except Exception as failure:
        if peer.key == "ours":
            raise
        entry.status = "failed"
        entry.sentence = traceback.format_exception_only(failure)[-1].strip()
        return entry, None
    if [y.shape for y in outputs] != [r.shape for r in exact]:
        got, want = ([list(t.shape) for t in tensors] for tensors in (outputs, exact))
        entry.status, entry.sentence = "wrong", f"output shapes {got}, expected {want}"
        return entry, None
    entry.error = error(outputs, exact)
    if peer.key == "ours" and not entry.error.within(precision.factor, own):
        entry.status = "wrong"
        entry.sentence = f"error {entry.error} is more than {precision.factor:g} times PyTorch's own ({own})"
        return entry, None
    if not entry.error.rms <= precision.wrong:
        entry.status = "wrong"
        entry.sentence = f"error {entry.error}; the limit is rms {precision.wrong:.0e}"
        return entry, None
    entry.status = "timed"
    return entry, call


def compare(
    model: nn.Module,
    x: Tensor,
    peers: Sequence[Peer],
    *,
    budget: float = 20.0,
    min_rounds: int = 5,
    guard: NoiseGuard | None = None,
    tell: Tell | None = None,
    precision: str = "highest",
) -> Comparison:
    """Check all peers, then time those that are right; `tell(share, what)` hears how far the whole is.

    precision: a key of precision.PRECISIONS; model and x are cast to its type.
    """
    tell = tell if tell is not None else (lambda share, what: None)
    threads = {p.threads for p in peers}
    if len(threads) != 1:
        raise ValueError(f"compare: all peers need the same number of threads, got {sorted(threads)}")
    wanted = PRECISIONS[precision]
    model, x = wanted.cast(model, x)
    before, matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads.pop())
    try:
        tell(0.0, "float64 reference")
        exact = exact_outputs(model, x)
        own = eager_error(model, x, exact)
        torch.set_float32_matmul_precision(wanted.matmul)
        entries, calls = [], []
        for i, peer in enumerate(peers):
            tell(0.1 + 0.4 * i / len(peers), f"preparing {peer.name}{peer.patience}")
            entry, call = check(peer, model, x, exact, own, wanted)
            entries.append(entry)
            if call is not None:
                calls.append(Candidate(peer.key, call))
        session = logits = None
        if calls:
            ours_or_first = next((c.call for c in calls if c.name == "ours"), calls[0].call)
            logits = ours_or_first()[0].clone()
            names = {e.key: e.name for e in entries}
            session = measure(
                calls,
                budget=budget,
                min_rounds=min_rounds,
                guard=guard,
                progress=lambda share, key: tell(0.5 + 0.5 * share, f"timing {names.get(key, key)}"),
            )
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(matmul)
    ours = next((e for e in entries if e.key == "ours"), None)
    parity = ours.status != "wrong" if ours is not None and ours.status in ("timed", "wrong") else None
    tell(1.0, "done")
    return Comparison(int(x.shape[0]), entries, own, session, parity, logits)
