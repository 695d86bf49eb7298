"""Every kernel on data whose arithmetic has no rounding; every instruction set; fresh memory full of NaN."""

import pytest
import torch
from helpers import (
    LAYOUTS,
    ROOT,
    assert_bit_equal,
    assert_equal,
    isas,
    layout_name,
    needs_native,
    poisoned,
    run_python,
)
from kernel_cases import CASES, KINDS, OPS, Case, conv, native_candidates, parameters, pool, prepared

from fast_backbones import kernels
from fast_backbones.kernels import _ext


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_integer_data_is_exact(case):
    """Every candidate that accepts, the reference and the automatic choice, in both layouts, under poison."""
    inputs = case.inputs("integers")
    expected = case.exact(inputs).float()
    with poisoned():
        for layout in LAYOUTS:
            laid_out = inputs.to_layout(layout)
            for backend in (*native_candidates(case.op), "reference", "auto"):
                if backend in ("reference", "auto") or case.accepted_by(backend):
                    actual = case.run(laid_out, backend)
                    assert_equal(actual, expected, f"{backend}, {layout_name(layout)}")


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_every_candidate_accepts_several_cases(op):
    """So that refusals cannot hide a path nobody runs."""
    for backend in native_candidates(op):
        accepted = [case for case in CASES if case.op == op and case.accepted_by(backend)]
        assert len(accepted) >= 4, f"{backend} accepts {[case.why for case in accepted]}"


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_every_candidate_is_chosen_somewhere(op):
    """The automatic choice reaches each native candidate on at least one case."""
    chosen = {
        kernels.explain(op, *case.inputs().args, **case.inputs().kwargs).chosen
        for case in CASES
        if case.op == op
    }
    assert set(native_candidates(op)) <= chosen


def cuts():
    """How the dense kernels cut the work of each case: form, whether in two phases, of several images."""
    module = _ext.native()
    for case in (c for c in CASES if c.weight is not None and len(c.x) == 4 and c.x[0] > 0):
        args = prepared(case)
        params = parameters(case, args)
        y = case.reference(case.inputs())
        for kind in (KINDS[name] for name in ("direct", "winograd") if name in native_candidates(case.op)):
            if module.refusal(kind, params):
                continue
            packed = torch.zeros(module.packed_floats(kind, params))
            operands = {"x": args[0], "weight": packed, "y": y}
            places = {name: (-1, tensor.data_ptr()) for name, tensor in operands.items()}
            plan = module.Plan()
            plan.add(kind, params, places, deps=[], name=case.why)
            plan.finish()
            (step,) = plan.profile(0, [], repeats=1, threads=1)
            words = step["detail"].split()[1:-1]
            form = " ".join(word for word in words if word[0].isalpha() and "(" not in word)
            yield form, "+" in step["detail"], case.x[0] > 1


@needs_native
def test_the_table_reaches_every_way_to_cut_the_work():
    """It depends on sizes and thresholds; each way must occur here, with several images too."""
    seen = set(cuts())
    for form in ("pointwise", "strided pointwise", "direct", "fused"):
        assert (form, False, True) in seen, f"{form}: only {sorted(seen)}"
    for form in ("strided pointwise", "direct", "two-phase"):
        assert (form, True, True) in seen, f"{form} in two phases: only {sorted(seen)}"


def test_references_match_the_written_formula():
    """The references are PyTorch calls; here the formulas of the docstrings as loops, on small cases."""
    case = conv(
        "loops",
        2,
        4,
        5,
        6,
        6,
        (3, 2),
        groups=2,
        residual=True,
        stride=(2, 1),
        padding=(1, 0),
        dilation=(1, 2),
    )
    inputs = case.inputs()
    x, weight, bias = inputs.args
    y = torch.empty_like(case.reference(inputs))
    for n, k, p, q in torch.cartesian_prod(*(torch.arange(size) for size in y.shape)).tolist():
        total = bias[k] + inputs.kwargs["residual"][n, k, p, q]
        for c, r, s in torch.cartesian_prod(*(torch.arange(size) for size in weight.shape[1:])).tolist():
            h, w = p * 2 + r - 1, q + 2 * s
            if 0 <= h < 5 and 0 <= w < 6:
                total = total + x[n, k // 3 * 2 + c, h, w] * weight[k, c, r, s]
        y[n, k, p, q] = total.clamp(min=0)
    assert_equal(case.reference(inputs), y, "conv2d_ref")

    case = pool("loops", (1, 2, 5, 6), (3, 2), stride=2, padding=(1, 0), ceil_mode=True)
    x = case.inputs().args[0]
    y = torch.empty_like(case.reference(case.inputs()))
    for n, c, p, q in torch.cartesian_prod(*(torch.arange(size) for size in y.shape)).tolist():
        y[n, c, p, q] = x[n, c, max(0, 2 * p - 1) : 2 * p + 2, 2 * q : 2 * q + 2].max()
    assert_equal(case.reference(case.inputs()), y, "max_pool2d_ref")

    x = Case("global_avg_pool", "loops", (2, 3, 4, 2)).inputs().args[0]
    assert_equal(kernels.global_avg_pool_ref(x), x.reshape(2, 3, 8).sum(2) / 8, "global_avg_pool_ref")
    x, weight, bias = Case("linear", "loops", (2, 5), (3, 5), {}, True).inputs().args
    assert_equal(kernels.linear_ref(x, weight, bias), (x[:, None] * weight).sum(2) + bias, "linear_ref")


@pytest.fixture(scope="module")
def results_by_isa(tmp_path_factory):
    """The whole table in a process per instruction set, exactness checked inside, with poisoned scratch."""
    folder = tmp_path_factory.mktemp("isa")
    results = {}
    for isa in isas():
        path = folder / f"{isa}.pt"
        run_python(
            str(ROOT / "tests" / "kernel_cases.py"), str(path), FB_MAX_ISA=isa, FB_POISON="1", timeout=300
        )
        saved = torch.load(path)
        assert saved["isa"] == isa
        results[isa] = saved["results"]
    return results


@needs_native
def test_exact_on_every_instruction_set(results_by_isa):
    assert list(results_by_isa) == isas()
    sizes = {isa: len(results) for isa, results in results_by_isa.items()}
    assert len(set(sizes.values())) == 1 and min(sizes.values()) > 2 * len(CASES), sizes


@needs_native
def test_avx2_and_avx512_give_the_same_bits_on_real_data(results_by_isa):
    if not {"avx2", "avx512"} <= set(results_by_isa):
        pytest.skip(f"this machine runs {', '.join(results_by_isa)}")
    for label, result in results_by_isa["avx512"].items():
        assert_bit_equal(result, results_by_isa["avx2"][label], label)


@needs_native
def test_misspelt_instruction_set_is_an_error():
    lines = [
        "import torch; from fast_backbones import kernels",
        "try: kernels.global_avg_pool(torch.ones(1, 1, 2, 2))",
        "except (ValueError, RuntimeError) as error: print(error)",
    ]
    done = run_python("-c", "\n".join(lines), FB_MAX_ISA="sse9")
    assert "sse9" in done.stdout and "avx2" in done.stdout
