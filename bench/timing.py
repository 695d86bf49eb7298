"""Interleaved timing: each round gives every candidate a short turn: a slow minute is slow for all.

    warm up    each candidate alone, until its time is known
    round      for each candidate, in rotating order:  wait | probe | one lead-in call | k timed calls
    stop       when the budget is spent and there are at least `min_rounds` rounds

Two things spoil comparisons on a shared machine, and each has a remedy here.

* Leftovers. Worker threads of some runtimes keep spinning after a call: ONNX Runtime's burned both cores for
  tens of milliseconds here, OpenMP's for a few. The next candidate would pay for it, so a turn starts only
  when this process has been idle for a moment (`wait_until_quiet`).
* Neighbours. A fixed loop is timed before each turn and after the last one. A round in which one of these
  readings stands out from the quiet level of the whole session is flagged as disturbed (`NoiseGuard`). The
  choice never looks at the candidates' own times, so leaving flagged rounds out does not favour anybody.

A ratio between two candidates is taken inside each round; the median over rounds is reported: drift cancels.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Clock = Callable[[], float]


@dataclass(frozen=True)
class Candidate:
    """Something to time: a name and a call without arguments that does the whole work each time."""

    name: str
    call: Callable[[], object]


@dataclass
class Round:
    """One pass over all candidates: `seconds[name]` are its timed calls, `probes` the guard's readings."""

    order: list[str]
    seconds: dict[str, list[float]]
    probes: list[float] = field(default_factory=list)


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0..1) with linear interpolation between neighbours; values need not be sorted."""
    if not values:
        raise ValueError("quantile: no values")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def wait_until_quiet(
    window: float = 0.008,
    idle_share: float = 0.1,
    give_up: float = 0.3,
    cpu_clock: Clock = time.process_time,
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """Sleep until this process's threads use less than `idle_share` of one core for a whole window.

    Returns the seconds slept. The window is longer than a scheduler tick (4 ms on common kernels): the CPU
    clock of threads that are running is only brought up to date at ticks. Gives up after `give_up` seconds.
    """
    slept = 0.0
    while slept < give_up:
        before = cpu_clock()
        sleep(window)
        slept += window
        if cpu_clock() - before < idle_share * window:
            break
    return slept


def matmul_loop(size: int = 128, repeats: int = 40) -> Callable[[], object]:
    """The loop that the guard times: small float32 matrix products on torch's threads (about 0.2 MB, a few
    ms)."""
    import torch

    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)

    def loop() -> None:
        with torch.no_grad():
            for _ in range(repeats):
                torch.mm(a, b, out=out)

    return loop


class NoiseGuard:
    """Times the same small loop again and again, and tells which rounds fell into a disturbed moment.

    A reading is the fastest of `tries` runs of the loop, so that a single interrupt does not count, but a
    neighbour who stays does. The quiet level is the 20 % quantile of all readings of the session; a reading
    above `tolerance` times that level is disturbed, and so is each round that holds one.
    """

    def __init__(
        self,
        loop: Callable[[], object] | None = None,
        *,
        tolerance: float = 1.15,
        tries: int = 2,
        clock: Clock = time.perf_counter,
    ):
        self.loop = loop if loop is not None else matmul_loop()
        self.tolerance = tolerance
        self.tries = tries
        self.clock = clock
        self.loop()

    def probe(self) -> float:
        """Seconds of the loop now."""
        best = float("inf")
        for _ in range(self.tries):
            start = self.clock()
            self.loop()
            best = min(best, self.clock() - start)
        return best

    def level(self, rounds: Sequence[Round]) -> float:
        """The loop's time when the machine is quiet, from all readings of the rounds."""
        return quantile([reading for r in rounds for reading in r.probes], 0.2)

    def disturbed(self, rounds: Sequence[Round]) -> list[bool]:
        """One flag per round."""
        if not rounds:
            return []
        limit = self.tolerance * self.level(rounds)
        return [max(r.probes) > limit for r in rounds]


@dataclass
class Session:
    """The rounds of one comparison, and what they say."""

    names: list[str]
    rounds: list[Round]
    disturbed: list[bool]
    calls_per_turn: dict[str, int]
    min_rounds: int = 5

    @property
    def disturbed_share(self) -> float:
        return sum(self.disturbed) / len(self.disturbed) if self.disturbed else 0.0

    @property
    def used(self) -> list[Round]:
        """The quiet rounds, when there are at least `min_rounds` of them; otherwise all rounds."""
        quiet = [r for r, bad in zip(self.rounds, self.disturbed, strict=True) if not bad]
        return quiet if len(quiet) >= self.min_rounds else self.rounds

    @property
    def uses_disturbed(self) -> bool:
        """True when too few rounds were quiet, so that disturbed ones had to be counted too."""
        return any(self.disturbed) and len(self.used) == len(self.rounds)

    def calls(self, name: str) -> list[float]:
        return [s for r in self.used for s in r.seconds[name]]

    def median(self, name: str) -> float:
        """Median seconds of one call."""
        return statistics.median(self.calls(name))

    def quartiles(self, name: str) -> tuple[float, float]:
        calls = self.calls(name)
        return quantile(calls, 0.25), quantile(calls, 0.75)

    def fastest(self, names: Sequence[str]) -> str:
        """The one with the smallest median."""
        return min(names, key=self.median)

    def ratios(self, slow: str, fast: str) -> list[float]:
        """How many times as long `slow` took as `fast`, one value per used round."""
        return [statistics.median(r.seconds[slow]) / statistics.median(r.seconds[fast]) for r in self.used]

    def ratio(self, slow: str, fast: str) -> float:
        """Median over rounds of `ratios`."""
        return statistics.median(self.ratios(slow, fast))

    def as_dict(self) -> dict[str, object]:
        """Everything that was measured, in plain data (milliseconds)."""
        return {
            "calls_per_turn": self.calls_per_turn,
            "min_rounds": self.min_rounds,
            "disturbed_share": round(self.disturbed_share, 4),
            "uses_disturbed_rounds": self.uses_disturbed,
            "rounds": [
                {
                    "order": r.order,
                    "disturbed": bad,
                    "probe_ms": [round(p * 1e3, 4) for p in r.probes],
                    "ms": {name: [round(s * 1e3, 5) for s in seconds] for name, seconds in r.seconds.items()},
                }
                for r, bad in zip(self.rounds, self.disturbed, strict=True)
            ],
        }

    @classmethod
    def from_dict(cls, data: dict) -> Session:
        """The session that `as_dict` wrote."""
        rounds = [
            Round(
                r["order"],
                {name: [ms * 1e-3 for ms in calls] for name, calls in r["ms"].items()},
                [ms * 1e-3 for ms in r["probe_ms"]],
            )
            for r in data["rounds"]
        ]
        disturbed = [r["disturbed"] for r in data["rounds"]]
        names = list(data["calls_per_turn"])
        return cls(names, rounds, disturbed, data["calls_per_turn"], data["min_rounds"])


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The order of round `turn`: start one further each round, and go backwards every other full rotation.

    So nobody is always first, and nobody always follows the same neighbour.
    """
    count = len(names)
    shift = turn % count
    order = [*names[shift:], *names[:shift]]
    return order[::-1] if (turn // count) % 2 else order


def warm_up(call: Callable[[], object], clock: Clock, seconds: float = 0.1, at_least: int = 2) -> float:
    """Run the call until it is warm; returns the seconds of its fastest call."""
    best, start, count = float("inf"), clock(), 0
    while count < at_least or clock() - start < seconds:
        before = clock()
        call()
        best = min(best, clock() - before)
        count += 1
    return best


def measure(
    candidates: Sequence[Candidate],
    *,
    budget: float = 10.0,
    min_rounds: int = 5,
    max_rounds: int = 400,
    turn: float = 0.1,
    most_calls: int = 200,
    guard: NoiseGuard | None = None,
    clock: Clock = time.perf_counter,
    settle: Callable[[], object] = wait_until_quiet,
    progress: Callable[[float, str], None] | None = None,
) -> Session:
    """Time the candidates against each other.

    Args:
        budget: seconds for the rounds; at least `min_rounds` are run even when that takes longer.
        turn: seconds that one candidate's timed calls should take in a round: k = turn / (time of one call),
        within
            2 and `most_calls`.
        guard: the noise guard (None: a new one); settle: called before each turn.
        progress: called with (share of the budget that is spent, name of the candidate whose turn it is).
    """
    names = [c.name for c in candidates]
    if not names:
        raise ValueError("measure: no candidates")
    if len(set(names)) != len(names):
        raise ValueError(f"measure: candidates need different names, got {names}")
    calls = {c.name: c.call for c in candidates}
    guard = guard if guard is not None else NoiseGuard(clock=clock)
    tell = progress if progress is not None else (lambda share, what: None)

    count: dict[str, int] = {}
    for name in names:
        tell(0.0, f"warm-up: {name}")
        one = warm_up(calls[name], clock)
        count[name] = max(2, min(most_calls, round(turn / one) if one > 0 else most_calls))

    rounds: list[Round] = []
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection inside a timed call would be charged to whoever happens to run
    try:
        start = clock()
        while len(rounds) < max_rounds and (len(rounds) < min_rounds or clock() - start < budget):
            this = Round(order=rotated(names, len(rounds)), seconds={})
            for name in this.order:
                spent = max((clock() - start) / budget if budget > 0 else 1.0, 0.0)
                tell(min(spent, len(rounds) / min_rounds, 1.0), name)
                settle()
                this.probes.append(guard.probe())
                call, seconds = calls[name], []
                call()
                for _ in range(count[name]):
                    before = clock()
                    call()
                    seconds.append(clock() - before)
                this.seconds[name] = seconds
            settle()
            this.probes.append(guard.probe())
            rounds.append(this)
    finally:
        if collecting:
            gc.enable()
    return Session(names, rounds, guard.disturbed(rounds), count, min_rounds)
