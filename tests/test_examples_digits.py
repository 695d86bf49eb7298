"""examples/digits.py: learns, saves, loads, and the fused plan predicts what the modules do."""

import importlib.util
import json
import sys

import pytest
import torch
from helpers import ROOT, needs_native, run_python

PROGRAM = ROOT / "examples" / "digits.py"


@pytest.fixture(scope="module")
def digits():
    """The program as a module."""
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("digits_example", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def result(digits, tmp_path):
    """A whole run as a reader would start it, with the default settings."""
    checkpoint = tmp_path / "lenet5.safetensors"
    done = run_python(str(PROGRAM), "--json", "--output", str(checkpoint))
    assert checkpoint.is_file()
    return json.loads(done.stdout)


@needs_native
def test_learns_the_digits_and_the_fused_plan_agrees(result):
    assert result["accuracy"] >= 0.98
    assert result["why_not"] is None
    assert result["fused_predictions_equal"]
    assert result["fused_largest_difference"] < 1e-4


def test_pth_checkpoints_and_the_printed_report(digits, tmp_path, capsys):
    before = torch.get_num_threads()
    path = tmp_path / "lenet5.pth"
    assert digits.main(["--epochs", "1", "--output", str(path), "--explain"]) == 0
    torch.set_num_threads(before)
    printed = capsys.readouterr().out
    assert "test accuracy" in printed and "the same predictions" in printed
    assert set(torch.load(path, weights_only=True)) >= {"c1.weight", "f6.bias", "output.weight"}


@pytest.mark.parametrize("split", ["random", "last"])
def test_the_parts_share_no_image_and_are_all_there(digits, split):
    data = digits.load_data(split, seed=0)
    assert len(data.train_labels) + len(data.test_labels) == 1797
    assert abs(len(data.test_labels) - 1797 / 5) < 1
    train = {image.numpy().tobytes() for image in data.train_images}
    assert not [image for image in data.test_images if image.numpy().tobytes() in train]
    assert set(data.test_labels.tolist()) == set(range(10))


def test_images_are_prepared_as_in_the_paper(digits):
    pixels = torch.zeros(2, 8, 8)
    pixels[1] = 16
    empty, full = digits.as_lenet_images(pixels)
    assert empty.shape == (1, 32, 32)
    torch.testing.assert_close(empty, torch.full((1, 32, 32), -0.1))
    torch.testing.assert_close(full[:, 6:26, 6:26], torch.full((1, 20, 20), 1.175))
    border = full.clone()
    border[:, 6:26, 6:26] = -0.1
    torch.testing.assert_close(border, empty)
    data = digits.load_data("random", seed=0)
    box = data.train_images[:, :, 6:26, 6:26]
    assert box.min() >= -0.1 and box.max() <= 1.175


def test_shifts_move_by_two_pixels_at_most(digits):
    image = torch.full((1, 1, 32, 32), -0.1)
    image[0, 0, 16, 16] = 1.0
    seen = set()
    for _ in range(300):
        moved = digits.shifted(image)
        assert moved.shape == image.shape
        (where,) = (moved[0, 0] == 1.0).nonzero().tolist()
        seen.add((where[0] - 16, where[1] - 16))
    assert seen == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}


@pytest.mark.parametrize("option", ["--epochs", "--batch", "--threads"])
def test_options_must_be_positive(digits, option, capsys):
    with pytest.raises(SystemExit):
        digits.main([option, "0"])
    assert "must be at least 1" in capsys.readouterr().err
