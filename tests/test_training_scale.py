"""Models under what PyTorch has for large trainings: DDP, FSDP2, SyncBatchNorm, recomputation in backward."""

import functools
import itertools

import pytest
import torch
import training_ranks as ranks
from helpers import ROOT, assert_as_accurate, assert_bit_equal, needs_native, run_python
from helpers import one_thread as one_thread
from torch.utils.checkpoint import checkpoint

import fast_backbones as fb

COUNT = 2
NAMES = [name for name, p in ranks.make_model().named_parameters() if p.requires_grad]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two processes has kept."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={COUNT}"]
    run_python(*launch, str(ROOT / "tests" / "training_ranks.py"), str(folder), OMP_NUM_THREADS="1")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(COUNT)]


@pytest.fixture(scope="module")
def one_process():
    """The weights after the same steps on whole batches, in float32 and in float64."""
    trained = []
    for dtype in (torch.float32, torch.float64):
        model = ranks.make_model(dtype)
        for _ in ranks.train(model, model, dtype=dtype):
            pass
        trained.append(moved(model.state_dict()))
    return trained


def moved(state):
    """How far the steps have moved the weights, as one vector."""
    start = ranks.make_model().state_dict()
    return torch.cat([(state[name] - start[name].to(state[name])).flatten() for name in NAMES])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does_on_the_joined_batch(results, one_process, kind):
    plain, exact = one_process
    assert plain.abs().max() > 1e-3
    assert_as_accurate(moved(results[0][kind]), plain, exact, kind)
    for name, tensor in results[0][kind].items():
        assert torch.equal(results[1][kind][name], tensor), name


@needs_native
def test_plans_notice_the_steps_of_ddp(results):
    evaluations = results[0]["evaluations"]
    assert [each["why_not"] for each in evaluations] == [None] * ranks.STEPS
    for each in evaluations:
        torch.testing.assert_close(each["plan"], each["modules"], rtol=1e-5, atol=1e-5)
    for before, after in itertools.pairwise(evaluations):
        assert not torch.allclose(before["plan"], after["plan"], rtol=1e-3, atol=1e-3)


@needs_native
def test_sharded_models_run_through_their_modules(results):
    assert results[0]["fsdp_why_not"] == "blocks.0.0 has forward hooks"  # which gather its weights
    model = ranks.make_model().eval()
    model.load_state_dict(results[0]["fsdp"])
    with torch.no_grad():
        expected = model(ranks.batch(100)[0])
    for each in results:
        torch.testing.assert_close(each["fsdp_logits"], expected, rtol=1e-5, atol=1e-5)


@needs_native
def test_norms_become_synchronised_ones_and_plans_take_them(results):
    """On the CPU PyTorch has them for eval() only."""
    result = results[0]
    assert result["synchronised"] == 27
    assert "expected input tensor to be on GPU" in result["refusal"]
    assert result["synchronised_why_not"] is None
    torch.testing.assert_close(result["synchronised_plan"], result["plain_plan"], rtol=1e-5, atol=1e-5)


BLOCKS = {"resnet18": "BasicBlock", "mobilenetv1_025": "DepthwiseBlock", "googlenet": "Inception"}


@pytest.mark.parametrize("name", BLOCKS)
def test_recomputed_blocks_give_the_same_gradients_to_the_bit(name):
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = fb.create_model(name, num_classes=5, drop_rate=0.2).train()
        blocks = [module for module in model.modules() if type(module).__name__ == BLOCKS[name]]
        assert len(blocks) > 7
        if recompute:
            for block in blocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        images, labels = ranks.batch(0)
        torch.manual_seed(1)
        with fb.backend("reference"):  # a block with a forward of its own makes the modules run anyway
            fb.training.auxiliary_loss(model(images[:2, :, :32, :32]), labels[:2]).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    for key, gradient in gradients[0].items():
        assert_bit_equal(gradients[1][key], gradient, key)
