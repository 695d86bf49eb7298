"""Results have eager's strides where that is hard: views, odd images, maps that are both NCHW and NHWC."""

import pytest
import torch
import torch.nn.functional as F
from fast_backbones.engine.strides import usual_strides
from helpers import needs_native
from helpers import one_thread as one_thread
from test_engine_fuse import Net, conv, norm, settle
from torch import nn

from fast_backbones import engine

pytestmark = needs_native


def spread(m, x):
    mean = m.conv(x).mean((2, 3), keepdim=True).expand(-1, -1, 5, 5)
    return mean, m.conv(mean)


def one_channel(m, x):
    heat = torch.relu(m.narrow(x))
    return m.wide(heat + heat), heat


def gate_seen_from_outside(m, x):
    return F.pad(torch.sigmoid(m.conv(x).mean((2, 3), keepdim=True)), (1, 1, 2, 2)) * 2


NETS = {
    "the result of expand, which a convolution reads too": Net(spread, conv=conv()),
    "overlapping windows": Net(lambda m, x: m.conv(x).unfold(2, 3, 1), conv=conv()),
    "a view of the image behind dropout": Net(lambda m, x: F.dropout(x.chunk(2, 1)[1], 0.5, False)),
    "a view of a view behind dropout": Net(
        lambda m, x: F.dropout(m.conv(x)[:, 2:5], 0.5, False)[:, :2], conv=conv(),
    ),
    "norm of every second channel": Net(
        lambda m, x: m.norm(m.conv(x)[:, ::2]), conv=conv(), norm=nn.BatchNorm2d(4),
    ),
    "norm of a transposed map": Net(lambda m, x: m.norm(m.conv(x).transpose(2, 3)), conv=conv(), norm=norm()),
    "a map of one channel": Net(one_channel, narrow=conv(8, 1, 1), wide=conv(1, 8, 1)),
    "a map of one pixel": Net(gate_seen_from_outside, conv=conv()),
    "a map of one pixel, convolved with padding": Net(
        lambda m, x: m.outer(torch.sigmoid(m.conv(x).mean((2, 3), keepdim=True))),
        conv=conv(), outer=nn.Conv2d(8, 8, 1, padding=1),
    ),
    "the image, a view of it and its ReLU": Net(
        lambda m, x: (x, x[:, 1:3], torch.relu(x), m.conv(x)), conv=conv(),
    ),
    "a copy of the image in a sum": Net(lambda m, x: m.conv(x) + x * 2, conv=conv()),
}  # fmt: skip
IMAGES = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "crop": lambda x: F.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2],
    "crop of channels_last": lambda x: F.pad(x, (1, 2)).to(memory_format=torch.channels_last)[..., 1:-2],
    "channels of more": lambda x: F.pad(x, (0, 0, 0, 0, 1, 3))[:, 1:-3],
    "channels of more, channels_last": lambda x: F.pad(x, (0, 0, 0, 0, 1, 3)).to(
        memory_format=torch.channels_last
    )[:, 1:-3],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one image, expanded": lambda x: x[:1].expand(2, -1, -1, -1),
}


def assert_like_eager(model, x):
    engine.refresh(model)
    with torch.no_grad():
        ours, plain = engine.forward(model, x, model.forward), model(x)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(plain)):
        assert a.stride() == b.stride()


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("why", NETS)
def test_strides_of_eager(why, image):
    assert_like_eager(settle(NETS[why]), IMAGES[image](torch.randn(2, 8, 6, 7)))


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("elementwise", [False, True], ids=["", "ReLU first"])
def test_an_image_of_one_channel(image, elementwise):
    model = settle(Net(lambda m, x: m.conv(x.relu() if elementwise else x), conv=conv(1, 8)))
    assert_like_eager(model, IMAGES[image](torch.randn(2, 1, 6, 7)))


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_of_one_pixel(image):
    model = settle(Net(lambda m, x: m.conv(m.norm(x)), norm=norm(), conv=nn.Conv2d(8, 8, 1, padding=1)))
    assert_like_eager(model, IMAGES[image](torch.randn(2, 8, 1, 1)))


def test_the_image_itself_is_returned():
    model = settle(Net(lambda m, x: (x, m.conv(x)), conv=conv()))
    x = IMAGES["crop"](torch.randn(2, 8, 6, 7))
    with torch.no_grad():
        assert engine.forward(model, x, model.forward)[0] is x
        assert "memory of the input" in engine.why_not(model, x)


def test_odd_images_have_plans_where_nobody_can_tell():
    model = settle(Net(lambda m, x: m.conv(x).relu(), conv=conv()))
    with torch.no_grad():
        for image in IMAGES.values():
            assert engine.why_not(model, image(torch.randn(2, 8, 6, 7))) is None


def test_memory_read_by_strides_has_no_plan():
    model = settle(Net(lambda m, x: m.conv(x).as_strided((2, 8, 2, 2), (336, 42, 7, 1)), conv=conv()))
    x = torch.randn(2, 8, 6, 7)
    with torch.no_grad(), pytest.warns(UserWarning, match="as_strided"):
        torch.testing.assert_close(engine.forward(model, x, model.forward), model(x))


def test_a_copy_has_the_format_that_convolutions_choose():
    """Of every kind of strides, gaps, zeros and single elements included."""
    draw = torch.Generator().manual_seed(0)
    steps = torch.tensor([0, 1, 2, 3, 4, 6, 8, 9, 12, 18, 27])
    for _ in range(2000):
        shape = torch.randint(1, 4, (4,), generator=draw).tolist()
        stride = steps[torch.randint(0, len(steps), (4,), generator=draw)].tolist()
        x = torch.empty_strided(shape, stride)
        ours, pooled = usual_strides(x), F.avg_pool2d(x, 1)
        if ours is not x:
            assert ours.stride() == pooled.stride(), (shape, stride)
