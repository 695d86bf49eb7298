"""examples/train.py: learns photographs, goes on after kill -9 to the bit, on one process and on many."""

import importlib.util
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_python
from PIL import Image
from torch import nn

import fast_backbones as fb

EXAMPLES = ROOT / "examples"
PROGRAM = EXAMPLES / "train.py"
LENET = ("--model", "lenet5", "--size", "32", "--batch", "4", "--lr", "0.1", "--label-smoothing", "0")
MOBILENET = (
    *("--model", "mobilenetv1_025", "--size", "64", "--batch", "6", "--lr", "0.01", "--drop-rate", "0.2"),
    *("--average-decay", "0.9", "--save-every", "2", "--log-every", "1", "--epochs", "2"),
)


@pytest.fixture(scope="module")
def program():
    """The program as a module, and its parts as `train`."""
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("train_example", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(EXAMPLES))
    for name in [name for name in sys.modules if name.split(".")[0] == "train"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Crops of scikit-learn's two photographs: sky, temple and flower, 12 images each and 6 to validate."""
    china, flower = pytest.importorskip("sklearn.datasets").load_sample_images().images
    parts = {"sky": china[:110], "temple": china[200:], "flower": flower[100:330, 150:500]}
    draw = random.Random(0)
    folder = tmp_path_factory.mktemp("photographs")
    for name, picture in parts.items():
        for i in range(18):
            top, left = (draw.randrange(side - 72) for side in picture.shape[:2])
            path = folder / ("train" if i < 12 else "val") / name / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture[top : top + 72, left : left + 72]).save(path)
    return folder


@pytest.fixture
def train(program, photographs, tmp_path):
    """The program in this process, on the photographs; returns its exit code."""

    def run(*options, data=photographs, output=tmp_path / "run"):
        arguments = [str(data), "--output", str(output), "--workers", "0", "--threads", "1", *options]
        return program.main(arguments)

    return run


@pytest.fixture(scope="module")
def uninterrupted(program, photographs, tmp_path_factory):
    """The state at the end of a run that nobody stopped."""
    output = tmp_path_factory.mktemp("uninterrupted")
    arguments = [str(photographs), "--output", str(output), "--workers", "0", "--threads", "1", *MOBILENET]
    assert program.main(arguments) == 0
    return state_of(output)


def state_of(output):
    return torch.load(output / "last.pt", weights_only=True)


def assert_same(actual, expected, where="state"):
    """To the bit, whatever is inside what."""
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(actual[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for i, value in enumerate(expected):
            assert_same(actual[i], value, f"{where}[{i}]")
    else:
        assert actual == expected, where


def command(data, output, *options, ranks=0):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    return [*launcher, str(PROGRAM), str(data), "--output", str(output), "--threads", "1", *options]


def begin(*arguments, **environment):
    """Another process group with this package; its lines can be read as they come."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    } | environment
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(process, words):
    """Read until a line has the words; everything read, should it not come."""
    read = []
    for line in process.stdout:
        read.append(line)
        if words in line:
            return
    pytest.fail(f"no {words!r} in\n{''.join(read)}")


def finished(process):
    """Everything that is still to be read; what does not end in time is killed."""
    try:
        return process.communicate(timeout=120)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def kill_group(process, number):
    os.killpg(process.pid, number)
    output = finished(process)
    return process.returncode, output


# ---- one process ----


def test_learns_photographs_and_the_best_checkpoint_loads(train, photographs, tmp_path, capsys):
    """Sky or temple: LeNet-5 sees no colours, and the flower is as rough as the temple."""
    (tmp_path / "two").mkdir()
    two = folder_with(tmp_path / "two", photographs, without=["train/flower", "val/flower"])
    assert train(*LENET, "--lr", "0.05", "--epochs", "10", "--average-decay", "0.8", data=two) == 0
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"train loss ([\d.]+)", printed)]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0]
    model = fb.lenet5(num_classes=2, weights=tmp_path / "run" / "best.safetensors").eval()
    to_input = fb.transforms_for(model)
    right = 0
    for label, name in enumerate(("sky", "temple")):
        images = torch.stack([to_input(Image.open(path)) for path in (photographs / "val" / name).iterdir()])
        with torch.inference_mode():
            right += (model(images).argmax(1) == label).sum().item()
    assert right / 12 >= 0.75
    assert f"best top-1 {right / 12:.2%}" in printed


def test_goes_on_after_kill_9_to_the_bit(train, photographs, tmp_path, uninterrupted):
    """Killed with two loader workers, continued without any, compared with a run that never had one."""
    output = tmp_path / "run"
    process = begin(*command(photographs, output, *MOBILENET, "--workers", "2"))
    wait_for(process, "epoch 2/2 step 3/")
    assert kill_group(process, signal.SIGKILL)[0] == -signal.SIGKILL
    left = state_of(output)
    assert left["epoch"] == 1 and 2 <= left["step"] < 6
    assert train(*MOBILENET, "--resume", "auto") == 0
    assert_same(state_of(output), uninterrupted)


def test_sigterm_saves_and_a_later_run_goes_on_to_the_bit(
    train, tmp_path, uninterrupted, monkeypatch, capsys
):
    from train.show import Show

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stop_at = 3
        patch.setattr(Show, "step", lambda _, done: done == stop_at and os.kill(os.getpid(), signal.SIGTERM))
        assert train(*MOBILENET) == 0
    assert "stopped by SIGTERM in epoch 1 after step 3" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler
    left = state_of(tmp_path / "run")
    assert (left["epoch"], left["step"]) == (0, 3)
    assert train(*MOBILENET, "--resume", str(tmp_path / "run" / "last.pt")) == 0
    assert_same(state_of(tmp_path / "run"), uninterrupted)


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_a_checkpoint_is_whole_or_the_one_before(program, tmp_path, monkeypatch, moment):
    from train import checkpoint

    path = tmp_path / "last.pt"
    checkpoint.save_state(path, {"step": 1})

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint.os, {"write": "fsync", "replace": "replace"}[moment], fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save_state(path, {"step": 2})
    assert checkpoint.load_state(path)["step"] == 1


def test_samples_depend_on_seed_epoch_and_index_alone(program, photographs):
    from train.data import ImageFolder

    transform = fb.transforms_for({"input_size": (3, 24, 24)}, train=True)
    folder = ImageFolder(photographs / "train", transform, seed=5)
    assert folder.classes == ["flower", "sky", "temple"] and len(folder) == 36
    first = folder[0, 7][0]
    state = torch.get_rng_state()
    folder[0, 8], folder[1, 7]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(folder[0, 7][0], first)
    for key, seed in (((1, 7), 5), ((0, 7), 6)):
        assert not torch.equal(ImageFolder(photographs / "train", transform, seed=seed)[key][0], first)


def test_batches_of_all_ranks_are_the_epoch_and_start_anywhere(program):
    from train.data import TrainingBatches, validation_batches
    from train.processes import Processes

    ranks = [Processes(rank, 3, torch.device("cpu")) for rank in range(3)]
    batches = [TrainingBatches(100, 8, rank, seed=0) for rank in ranks]
    whole = [list(each) for each in batches]
    drawn = [key for each in whole for batch in each for key in batch]
    assert len(drawn) == len(set(drawn)) == 4 * 3 * 8 and {epoch for epoch, _ in drawn} == {0}
    for each, expected in zip(batches, whole):
        each.start = 3
        assert list(each) == expected[3:] and len(each) == 1
        each.epoch = 1
        assert [i for _, i in next(iter(each))] != [i for _, i in expected[3]]
    held_out = [index for rank in ranks for batch in validation_batches(10, 2, rank) for _, index in batch]
    assert sorted(held_out) == list(range(10))


def test_the_rate_rises_and_falls_as_a_cosine_and_norms_have_no_decay(program):
    from train.settings import CosineSchedule, make_optimizer, parse

    options = parse("", ["DATA", "--lr", "2", "--weight-decay", "0.5", "--momentum", "0.9"])
    optimizer = make_optimizer(options, nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), None)
    assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups} == {
        "weights": 0.5,
        "biases": 0.0,
        "norms": 0.0,
    }
    schedule = CosineSchedule(optimizer, steps=12, warmup=4)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0) and rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True)
    assert optimizer.param_groups[2]["lr"] == 0.0


def test_frozen_batch_norms_stay_as_the_weights_file_has_them(train, tmp_path):
    torch.manual_seed(3)
    start = fb.mobilenetv1_025(num_classes=5)
    for norm in (m for m in start.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.running_mean.uniform_(-0.1, 0.1)
    torch.save(start.state_dict(), tmp_path / "start.pth")
    options = ("--weights", str(tmp_path / "start.pth"), "--frozen-batch-norm", "--layout", "contiguous")
    assert train(*MOBILENET, *options, "--epochs", "1") == 0
    end, begun = state_of(tmp_path / "run")["model"], start.state_dict()
    norms = [name for name in begun if re.search(r"bn\d", name)]
    assert len(norms) == 5 * 27
    assert_same({name: end[name] for name in norms}, {name: begun[name] for name in norms})
    assert end["classifier.weight"].shape == (3, 256)
    assert not torch.equal(end["conv_stem.weight"], begun["conv_stem.weight"])


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_goes_on_to_the_bit(train, tmp_path, amp, monkeypatch):
    from fast_backbones.engine.train_program import Program
    from train.show import Show

    calls, call = [], Program.__call__
    monkeypatch.setattr(Program, "__call__", lambda program, x: calls.append(1) or call(program, x))
    options = (*LENET, "--amp", amp, "--clip-norm", "1", "--epochs", "2", "--lr", "0.05")
    assert train(*options) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Show, "step", lambda _, done: done == 4 and os.kill(os.getpid(), signal.SIGTERM))
        assert train(*options, output=tmp_path / "stopped") == 0
    assert train(*options, "--resume", "auto", output=tmp_path / "stopped") == 0
    expected = state_of(tmp_path / "run")
    assert_same(state_of(tmp_path / "stopped"), expected)
    assert bool(expected["scaler"]) == (amp == "float16")
    assert calls or not fb.build_info()["native"]  # fused under autocast, too


def test_recipes_of_papers_with_their_own_optimisers_and_plateaus(train, tmp_path, capsys):
    small = ("--batch", "12", "--size", "32", "--epochs", "1", "--recipe")
    assert train("--model", "mobilenetv1_025", *small, output=tmp_path / "mobilenet") == 0
    groups = state_of(tmp_path / "mobilenet")["optimizer"]["param_groups"]
    assert groups[0]["alpha"] == 0.9 and groups[0]["lr"] == 0.045
    assert {group["name"]: group["weight_decay"] for group in groups}["depthwise"] == 0.0
    assert train("--model", "resnet18", *small, output=tmp_path / "resnet") == 0
    assert state_of(tmp_path / "resnet")["schedule"]["best"] < 1.0  # of a ReduceLROnPlateau
    assert train("--model", "resnet18", *small, "--resume", "auto", output=tmp_path / "resnet") == 0


def test_tensorboard_gets_losses_and_scores(train, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(*LENET, "--epochs", "2", "--log-dir", str(tmp_path / "log"), "--log-every", "3") == 0
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [3, 6, 9, 12, 15, 18]
    assert [event.step for event in events.Scalars("average/top1")] == [9, 18]


def test_a_diverged_loss_ends_the_run_and_leaves_the_checkpoint(train, tmp_path, capsys):
    assert train(*LENET, "--epochs", "1") == 0
    expected = state_of(tmp_path / "run")
    options = ("--lr", "1e30", "--epochs", "2", "--log-every", "1", "--warmup", "0")
    assert train(*LENET, *options, output=tmp_path / "diverged") == 1
    assert "the loss is nan in epoch 1, step 2: try a smaller --lr" in capsys.readouterr().err
    assert not (tmp_path / "diverged" / "last.pt").exists()
    assert_same(state_of(tmp_path / "run"), expected)


# ---- errors in words ----


def folder_with(tmp_path, photographs, *, without=(), extra=()):
    """DATA as it should be but for some classes, and with files of `extra` besides."""
    for part in ("train", "val"):
        for name in ("flower", "sky", "temple"):
            if f"{part}/{name}" not in without and part not in without:
                (tmp_path / part).mkdir(exist_ok=True)
                (tmp_path / part / name).symlink_to(photographs / part / name)
    for name, content in extra:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            (tmp_path / name).write_bytes(content)
    return tmp_path


DATA_PROBLEMS = {
    "no val": ({"without": ["val"]}, r"DATA: there is no folder \S+val"),
    "no class": (
        {"without": [f"train/{n}" for n in ("flower", "sky", "temple")]},
        "DATA: .*train has no folders",
    ),
    "empty class": (
        {"extra": [("train/empty/readme.txt", b"")]},
        r"DATA: .*train.empty has no image \(\.bmp",
    ),
    "new class in val": (
        {"extra": [("val/bird/0.png", b"")]},
        "DATA: .*val has classes that training has not: bird",
    ),
    "broken image": (
        {"extra": [("train/bird/0.png", b"no image")]},
        r"DATA: .*bird.0\.png is no usable image",
    ),
}


@pytest.mark.parametrize("case", DATA_PROBLEMS)
def test_data_errors_name_the_folder(train, photographs, tmp_path, capsys, case):
    changes, message = DATA_PROBLEMS[case]
    data = tmp_path / "data"
    (data / "train").mkdir(parents=True)
    assert train(*LENET, "--epochs", "1", data=folder_with(data, photographs, **changes)) == 2
    assert re.match(f"train: {message}", capsys.readouterr().err)


def test_a_broken_image_in_a_worker_ends_the_program(photographs, tmp_path):
    (tmp_path / "data").mkdir()
    data = folder_with(tmp_path / "data", photographs, extra=[("train/bird/0.png", b"no image")])
    process = begin(*command(data, tmp_path / "run", *LENET, "--workers", "1", "--epochs", "1"))
    output = finished(process)
    assert process.returncode == 2
    assert re.search(r"^train: DATA: .*bird.0.png is no usable image: cannot identify", output, re.MULTILINE)


OPTION_PROBLEMS = {
    "unknown model": (
        ["--model", "resnet19"],
        "--model: no model is called 'resnet19': did you mean resnet18",
    ),
    "no recipe": (["--recipe"], "--recipe: no recipe for 'lenet5'"),
    "open recipe": (["--model", "resnet18", "--recipe"], "the resnet paper names no epochs: give --epochs"),
    "no weights": (["--weights", "nowhere.pth"], "--weights: .*nowhere.pth"),
    "large batch": (
        ["--batch", "64"],
        "--batch 64: a step of 1 processes takes 64 images, DATA/train has 36",
    ),
    "no checkpoint": (["--resume", "nowhere.pt"], "--resume: there is no file nowhere.pt"),
    "cpu": (["--sync-batch-norm", "--device", "cpu"], "--sync-batch-norm: PyTorch has it for GPUs only"),
}


@pytest.mark.parametrize("case", OPTION_PROBLEMS)
def test_option_errors_name_the_option(train, capsys, case):
    options, message = OPTION_PROBLEMS[case]
    assert train(*LENET, *options) == 2
    assert re.search(message, capsys.readouterr().err)


def test_only_the_same_run_goes_on(train, photographs, tmp_path, capsys):
    assert train(*LENET, "--epochs", "1") == 0

    def refused(*options, data=photographs):
        assert train(*LENET, "--epochs", "1", *options, data=data) == 2
        return capsys.readouterr().err

    assert "holds last.pt of an earlier run: --resume auto goes on with it" in refused()
    assert "was written with batch 4, this run has batch 6" in refused("--resume", "auto", "--batch", "6")
    (tmp_path / "two").mkdir()
    two = folder_with(tmp_path / "two", photographs, without=["train/sky", "val/sky"])
    assert "was trained on 3 classes, DATA has 2" in refused("--resume", "auto", data=two)
    image = next((photographs / "train" / "sky").iterdir())
    more = [(f"{part}/{n}/0.png", image.read_bytes()) for part in ("train", "val") for n in ("a", "b", "c")]
    (tmp_path / "other").mkdir()
    other = folder_with(tmp_path / "other", photographs, without=["train", "val"], extra=more)
    assert "classes of other names" in refused("--resume", "auto", "--batch", "1", data=other)
    last = tmp_path / "run" / "last.pt"
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    assert f"--resume: {last} cannot be read" in refused("--resume", "auto")
    torch.save({"weight": torch.zeros(1)}, last)
    assert "is no checkpoint of this program; --weights" in refused("--resume", "auto")


def test_tensorboard_is_named_where_it_is_absent(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(*LENET, "--log-dir", str(tmp_path / "log")) == 2
    assert "--log-dir needs the package tensorboard (pip install tensorboard)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [["--epochs", "0"], ["--warmup", "1"], ["--frozen-batch-norm", "--sync-batch-norm"]]
)
def test_values_out_of_range_are_refused(program, option, capsys):
    with pytest.raises(SystemExit):
        program.main(["DATA", *option])
    assert option[0] in capsys.readouterr().err


# ---- many processes ----

DRIVER = f"""
import importlib.util, os, sys, torch
sys.path.insert(0, {str(EXAMPLES)!r})
spec = importlib.util.spec_from_file_location("train_example", {str(PROGRAM)!r})
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
from train.loop import Run

def finish(run, plain=Run.train):
    plain(run)
    kept = {{"model": run.model.state_dict(), "average": run.average.average}}
    torch.save(kept, run.options.output / f"rank{{run.processes.rank}}.pt")

Run.train = finish
sys.exit(program.main())
"""


def test_two_processes_end_with_the_same_weights(photographs, tmp_path):
    driver, output = tmp_path / "driver.py", tmp_path / "run"
    driver.write_text(DRIVER)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(driver)]
    options = ["--output", str(output), "--workers", "0", "--threads", "1", *MOBILENET, "--batch", "9"]
    done = run_python(*launch, str(photographs), *options, OMP_NUM_THREADS="1")
    assert "3 classes, 2 steps an epoch, 2 processes" in done.stdout
    assert done.stdout.count("epoch 2/2  train loss") == 1
    ranks = [torch.load(output / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same(ranks[1], ranks[0])
    state = state_of(output)
    assert_same(state["model"], ranks[0]["model"])
    dropout = [rank["random"]["torch"] for rank in state["ranks"]]
    assert not torch.equal(*dropout)


@pytest.mark.slow
def test_a_killed_rank_starts_anew_and_ends_to_the_bit(photographs, tmp_path):
    """torchrun restarts all. Of three processes, as the order of their sums depends on DDP's buckets."""
    options = (*MOBILENET, "--batch", "2", "--workers", "1")
    run_python(*command(photographs, tmp_path / "whole", *options, ranks=3), OMP_NUM_THREADS="1")
    restart = command(photographs, tmp_path / "killed", *options, "--resume", "auto", ranks=3)
    new_store = {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"
    }  # else the new ranks meet addresses of the old ones
    process = begin(*restart[:2], "--max-restarts=1", *restart[2:], **new_store)
    wait_for(process, "epoch 1/2 step 3/")
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    output = finished(process)
    assert process.returncode == 0, output
    assert output.count("mobilenetv1_025: 36 images") == 1, output  # wait_for has read the first
    assert_same(state_of(tmp_path / "killed"), state_of(tmp_path / "whole"))


def ranks_of(process):
    """The processes that torchrun has started, in order of their start."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
def test_sigterm_to_all_processes_saves_and_ends(photographs, tmp_path):
    options = (*MOBILENET, "--batch", "2", "--workers", "1", "--save-every", "1000")
    process = begin(*command(photographs, tmp_path / "run", *options, ranks=2))
    wait_for(process, "epoch 1/2 step 3/")
    output = kill_group(process, signal.SIGTERM)[1]
    assert "stopped by SIGTERM in epoch 1 after step" in output
    left = state_of(tmp_path / "run")
    assert left["epoch"] == 0 and 3 <= left["step"] < 9
    run_python(
        *command(photographs, tmp_path / "run", *options, "--resume", "auto", ranks=2), OMP_NUM_THREADS="1"
    )
    assert state_of(tmp_path / "run")["epoch"] == 2


@pytest.mark.slow
def test_compiled_training_and_auxiliary_heads(train, tmp_path):
    assert train(*LENET, "--epochs", "1", "--compile", output=tmp_path / "compiled") == 0
    assert train("--model", "googlenet", "--batch", "12", "--size", "64", "--epochs", "1") == 0
