"""The 2x rule on real data, and the ceiling per element that short partial sums promise."""

import pytest
import torch
from helpers import LAYOUTS, assert_as_accurate, layout_name, needs_native
from helpers import one_thread as one_thread
from kernel_cases import CASES, Inputs, conv, linear, native_candidates, pointwise

DEEP = [
    conv("2304 products", 1, 256, 9, 9, 24, padding=1, relu=False),
    conv("4608 products", 2, 512, 7, 7, 16, padding=1, relu=False),
    pointwise("2048 products", 1, 2048, 7, 7, 40, relu=False),
    linear("4600 products", 4, 4600, 50),
]
UNIT = torch.finfo(torch.float32).eps / 2


ENOUGH = 4000  # outputs, below which the largest error says more about the seed than about the kernel


def several_runs(case, data, layout):
    """Exact, plain and each candidate's outputs of as many seeds as it takes, flat."""
    runs = {"exact": [], "plain": []} | {
        name: [] for name in native_candidates(case.op) if case.accepted_by(name)
    }
    for seed in range(8):
        inputs = case.inputs(data, seed)
        runs["exact"].append(case.exact(inputs).flatten())
        laid_out = inputs.to_layout(layout)
        runs["plain"].append(case.reference(laid_out).flatten())
        for backend in list(runs)[2:]:
            runs[backend].append(case.run(laid_out, backend).flatten())
        if sum(len(part) for part in runs["exact"]) >= ENOUGH:
            break
    return {name: torch.cat(parts) for name, parts in runs.items()}


@needs_native
@pytest.mark.parametrize("data", ["reals", "positive"])
@pytest.mark.parametrize("case", [c for c in CASES if c.x[0] > 0] + DEEP, ids=lambda case: case.id)
def test_at_most_twice_pytorchs_error(case, data):
    """Against PyTorch in the same layout; its NCHW run sums in several accumulators and is hard to match."""
    for layout in LAYOUTS:
        runs = several_runs(case, data, layout)
        exact, plain = runs.pop("exact"), runs.pop("plain")
        for backend, fast in runs.items():
            assert_as_accurate(fast, plain, exact, f"{backend}, {layout_name(layout)}, {data}")


@needs_native
@pytest.mark.parametrize("data, ceiling", [("reals", 8), ("positive", 12)])
@pytest.mark.parametrize("case", DEEP, ids=lambda case: case.id)
def test_error_per_element_stays_that_of_short_sums(case, data, ceiling):
    """abs(error) <= ceiling * 2^-24 * sum abs(x) abs(w): short sums, added in order."""
    inputs = case.inputs(data)
    exact = case.exact(inputs)
    size = case.exact(inputs.map(torch.abs))
    backend = "native" if case.op == "linear" else "direct"
    worst = ((case.run(inputs, backend) - exact).abs() / (UNIT * size)).max().item()
    assert worst <= ceiling


@needs_native
def test_the_rule_itself_rejects_a_kernel_that_drops_precision():
    """Sums in bfloat16 must not pass, nor a single wrong element."""
    case = DEEP[0]
    inputs = case.inputs("reals")
    exact, plain = case.exact(inputs), case.reference(inputs)
    assert_as_accurate(plain, plain, exact)
    with pytest.raises(AssertionError, match="max error"):
        assert_as_accurate(case.reference(inputs.map(lambda t: t.bfloat16())).float(), plain, exact)
    spoiled = plain.clone()
    spoiled[0, 3, 4, 5] += 1e-4
    with pytest.raises(AssertionError, match="max error"):
        assert_as_accurate(spoiled, plain, exact)


def test_references_run_in_every_floating_dtype():
    case = conv("dtypes", 1, 8, 5, 5, 8, padding=1, residual=True)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        inputs: Inputs = case.inputs("reals").map(lambda t: t.to(dtype))  # noqa: B023
        assert case.run(inputs).dtype == dtype
