"""Interleaved timing under a fake clock: rounds, orders, disturbed rounds, quantiles."""

import itertools
import math

import pytest
from fast_backbones.bench import timing


class FakeMachine:
    """A clock that moves only when fake work runs; between the `busy` times work takes twice as long."""

    def __init__(self, busy=(math.inf, math.inf)):
        self.now = 0.0
        self.busy = busy
        self.log = []

    def clock(self):
        return self.now

    def work(self, name, seconds):
        def call():
            self.log.append(name)
            self.now += seconds * (2 if self.busy[0] <= self.now < self.busy[1] else 1)

        return call

    def guard(self, **options):
        return timing.NoiseGuard(self.work("probe", 0.001), clock=self.clock, **options)

    def measure(self, costs, **options):
        candidates = [timing.Candidate(name, self.work(name, seconds)) for name, seconds in costs.items()]
        return timing.measure(
            candidates, guard=self.guard(), clock=self.clock, settle=lambda: None, **options
        )


def test_medians_and_ratios_of_a_quiet_machine():
    session = FakeMachine().measure({"slow": 0.030, "fast": 0.010}, budget=5)
    assert session.median("slow") == pytest.approx(0.030) and session.median("fast") == pytest.approx(0.010)
    assert session.ratio("slow", "fast") == pytest.approx(3.0)
    assert session.quartiles("slow") == pytest.approx((0.030, 0.030))
    assert session.fastest(["slow", "fast"]) == "fast"
    assert session.disturbed_share == 0.0 and not session.uses_disturbed


def test_calls_per_turn_adapt_to_the_time_of_a_call():
    session = FakeMachine().measure({"long": 2.0, "short": 0.004, "instant": 1e-6}, budget=0, min_rounds=1)
    assert session.calls_per_turn == {"long": 2, "short": 25, "instant": 200}
    assert [len(session.rounds[0].seconds[n]) for n in ("long", "short", "instant")] == [2, 25, 200]


def test_rounds_stop_at_the_budget_but_not_before_the_minimum():
    assert len(FakeMachine().measure({"a": 0.05, "b": 0.05}, budget=0, min_rounds=4).rounds) == 4
    long = FakeMachine().measure({"a": 0.05, "b": 0.05}, budget=10)
    spent = sum(sum(map(sum, r.seconds.values())) for r in long.rounds)
    assert 5 < spent < 11
    assert len(FakeMachine().measure({"a": 0.05}, budget=1e9, max_rounds=7).rounds) == 7


def test_every_candidate_takes_each_place_and_neighbours_change():
    names = ["a", "b", "c"]
    orders = [timing.rotated(names, turn) for turn in range(6)]
    for place in range(3):
        assert {order[place] for order in orders} == set(names)
    followers = {(x, y) for order in orders for x, y in itertools.pairwise(order)}
    assert len(followers) == 6


def test_each_turn_settles_probes_and_leads_in_before_it_times():
    fake, settled = FakeMachine(), []
    candidates = [timing.Candidate("a", fake.work("a", 0.05))]
    timing.measure(
        candidates, budget=0, min_rounds=1, guard=fake.guard(tries=1), clock=fake.clock,
        settle=lambda: settled.append(len(fake.log)),
    )  # fmt: skip
    assert fake.log[-6:] == [
        "a",
        "probe",
        "a",
        "a",
        "a",
        "probe",
    ]  # warm-up | probe, lead-in, two timed | probe
    assert settled == [len(fake.log) - 5, len(fake.log) - 1]


def test_disturbed_rounds_are_flagged_and_left_out():
    fake = FakeMachine(busy=(2.0, 4.0))
    session = fake.measure({"slow": 0.030, "fast": 0.010}, budget=8)
    assert 0.1 < session.disturbed_share < 0.5
    assert len(session.used) == len(session.rounds) - sum(session.disturbed)
    assert max(session.calls("slow")) == pytest.approx(0.030)
    assert not session.uses_disturbed


def test_too_few_quiet_rounds_means_all_count_and_it_says_so():
    rounds = [timing.Round(["a"], {"a": [1.0]}, [0.001]) for _ in range(4)]
    session = timing.Session(["a"], rounds, [True, True, False, True], {"a": 1}, min_rounds=3)
    assert len(session.used) == 4 and session.uses_disturbed and session.disturbed_share == 0.75


def test_guard_judges_by_the_quiet_level_of_the_whole_session():
    guard = timing.NoiseGuard(lambda: None, tolerance=1.2)
    readings = [[1.0, 1.05], [1.0, 1.5], [1.1, 1.15], [3.0, 1.0]]
    rounds = [timing.Round([], {}, r) for r in readings]
    assert guard.disturbed(rounds) == [False, True, False, True]
    assert guard.disturbed([]) == []


def test_wait_until_quiet_waits_for_spinning_threads_and_gives_up():
    cpu = iter([0.0, 0.016, 0.016, 0.024, 0.024, 0.0241])  # two busy windows, then an idle one
    slept = timing.wait_until_quiet(0.008, cpu_clock=lambda: next(cpu), sleep=lambda s: None)
    assert slept == pytest.approx(0.024)
    ever = iter(range(1000))
    assert (
        timing.wait_until_quiet(0.01, give_up=0.1, cpu_clock=lambda: next(ever), sleep=lambda s: None) < 0.12
    )


def test_quantiles_interpolate():
    assert timing.quantile([4, 1, 3, 2], 0.5) == 2.5
    assert timing.quantile([1], 0.9) == 1
    with pytest.raises(ValueError, match="no values"):
        timing.quantile([], 0.5)


def test_measure_refuses_what_it_cannot_tell_apart():
    with pytest.raises(ValueError, match="different names"):
        timing.measure([timing.Candidate("a", int), timing.Candidate("a", int)])
    with pytest.raises(ValueError, match="no candidates"):
        timing.measure([])
