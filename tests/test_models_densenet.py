"""DenseNet: the networks of torchvision and timm, the paper's options, and recomputation in backward."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from fast_backbones.backbones.densenet import DenseBlock, DenseLayer
from helpers import assert_as_accurate
from model_checks import (
    check_common_face,
    check_facts,
    check_same_features,
    check_same_network,
    check_tracing,
    check_training_step,
    described,
    image,
    peer,
    same,
    trained,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fast_backbones import backbones

STRIDES = (2, 4, 8, 16, 32)
TABLE = [
    ("densenet121", 7.98, 2.83, (64, 256, 512, 1024, 1024), STRIDES),
    ("densenet169", 14.15, 3.36, (64, 256, 512, 1280, 1664), STRIDES),
    ("densenet201", 20.01, 4.29, (64, 256, 512, 1792, 1920), STRIDES),
    ("densenet161", 28.68, 7.73, (96, 384, 768, 2112, 2208), STRIDES),
    ("densenet264", 33.34, 5.75, (64, 256, 512, 2304, 2688), STRIDES),
]
NAMES = [row[0] for row in TABLE]
BLOCKS_264 = (6, 12, 64, 48)


def tiny(**options):
    """One or two layers a block: every kind of layer in a fraction of a second."""
    return backbones.densenet(8, (2, 1, 2, 1), 16, **options)


def theirs_of(name: str, **options):
    models = peer("torchvision").models
    if name == "densenet264":
        return models.DenseNet(32, BLOCKS_264, 64, **options)
    return getattr(models, name)(**options)


@pytest.mark.parametrize("row", TABLE, ids=NAMES)
def test_facts(row):
    check_facts(row, "DenseNet", (3, 224, 224))


def test_common_face():
    check_common_face(tiny, 2, 3, 64, 65, activated=("features.norm5",))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"bottleneck": False}], ids=["bottleneck", "plain"])
def test_tracing(options):
    check_tracing(trained(tiny(num_classes=5, **options)).eval(), 2, 3, 64, 64)


# The same network as torchvision's and timm's


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_state_dict_is_torchvisions(name):
    with torch.device("meta"):
        assert described(theirs_of(name)) == described(backbones.create_model(name))


@pytest.mark.peer
@pytest.mark.parametrize("name", [n for n in NAMES if n != "densenet264"])
def test_state_dict_is_timms(name):
    timm = peer("timm")
    with torch.device("meta"):
        assert described(timm.create_model(name)) == described(backbones.create_model(name))


@pytest.mark.peer
@pytest.mark.parametrize("name", ["densenet121", "densenet161"])
def test_seeded_initialisation_is_torchvisions_to_the_bit(name):
    torch.manual_seed(7)
    theirs = theirs_of(name).state_dict()
    torch.manual_seed(7)
    ours = backbones.create_model(name).state_dict()
    assert [k for k in theirs if not torch.equal(theirs[k], ours[k])] == []


@pytest.mark.peer
def test_network_equals_torchvision():
    check_same_network(
        backbones.densenet121(num_classes=9),
        theirs_of("densenet121", num_classes=9),
        (2, 3, 64, 64),
        (3, 3, 65, 97),
    )


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_network_equals_torchvision_at_the_default_size(name):
    check_same_network(backbones.create_model(name), theirs_of(name), (1, 3, 224, 224), (3, 3, 225, 193))


@pytest.mark.peer
@pytest.mark.parametrize("options", [{}, {"out_indices": (1, 3)}, {"in_chans": 1}], ids=str)
def test_features_equal_timms(options):
    theirs = trained(peer("timm").create_model("densenet121", features_only=True, **options)).eval()
    ours = backbones.densenet121(features_only=True, **options).eval()
    plain_names = {k.replace("features_", "features.", 1): v for k, v in theirs.state_dict().items()}
    backbones.load_weights(ours, plain_names)
    channels = options.get("in_chans", 3)
    check_same_features(ours, theirs, (1, channels, 64, 64), (3, channels, 65, 97))


@pytest.mark.peer
@pytest.mark.parametrize("memory_efficient", [False, True], ids=["kept", "recomputed"])
def test_training_steps_equal_torchvision(memory_efficient):
    """The peer keeps everything: its own recomputation counts the statistics twice."""
    theirs = peer("torchvision").models.DenseNet(8, (2, 1, 2, 1), 16, drop_rate=0.2, num_classes=2)
    ours = tiny(num_classes=2, drop_rate=0.2, memory_efficient=memory_efficient)
    check_training_step(ours, theirs, 4, 3, 64, 64)


# The paper's options


def test_layer_without_bottleneck():
    layer = DenseLayer(24, 8, bottleneck=False).eval()
    assert [k for k in layer.state_dict() if k.endswith("weight")] == ["norm1.weight", "conv1.weight"]
    x = image(2, 24, 7, 9)
    want = F.conv2d(layer.norm1(x).relu(), layer.conv1.weight, padding=1)
    assert layer.conv1.weight.shape == (8, 24, 3, 3) and torch.equal(layer([x]), want)


def test_new_channels_are_appended_at_the_end():
    block, x = trained(DenseBlock(3, 16, 8)).eval(), image(2, 16, 7, 9)
    y = block(x)
    assert y.shape == (2, 40, 7, 9) and torch.equal(y[:, :16], x)
    assert torch.equal(y[:, 16:24], block.denselayer1([x]))
    assert torch.equal(y[:, 32:], block.denselayer3([x, y[:, 16:24], y[:, 24:32]]))


@pytest.mark.parametrize(
    "options, channels",
    [
        ({}, [16, 32, 24, 28, 22]),
        ({"compression": 1.0}, [16, 32, 40, 56, 64]),
        ({"compression": 0.7}, [16, 32, 30, 37, 33]),
        ({"growth_rate": 4}, [16, 24, 16, 16, 12]),
        ({"num_init_features": 10}, [10, 26, 21, 26, 21]),
        ({"block_config": (1, 1, 1, 1)}, [16, 24, 20, 18, 17]),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_channels_follow_growth_rate_and_compression(options, channels):
    shape = {"growth_rate": 8, "block_config": (2, 1, 2, 1), "num_init_features": 16, **options}
    model = backbones.densenet(features_only=True, **shape)
    assert model.feature_info.channels() == channels
    assert [t.shape[1] for t in model.eval()(image(1))] == channels


def test_options_reach_the_named_models():
    with torch.device("meta"):
        model = backbones.densenet121(growth_rate=12, compression=1.0, bottleneck=False, bn_size=2)
    assert model.features.denseblock1.denselayer1.conv1.weight.shape == (12, 64, 3, 3)
    assert model.features.transition1.conv.weight.shape == (136, 136, 1, 1)


def test_dropout_acts_on_the_new_channels_in_training_only():
    layer, x = DenseLayer(16, 64, drop_rate=0.5), image(2, 16)
    assert 0.45 < (layer.train()([x]) == 0).float().mean() < 0.55
    assert (layer.eval()([x]) == 0).float().mean() < 0.01


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_config": (1, 2, 3)}, "block_config"),
        ({"block_config": (1, 0, 3, 1)}, "block_config"),
        ({"growth_rate": 0}, "growth_rate"),
        ({"compression": 0.0}, "compression"),
        ({"compression": 1.5}, "compression"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        backbones.densenet(**options)


# Recomputation in backward


def gradients(model, x, train=True, between=lambda model: None):
    model.train(train)
    torch.manual_seed(3)
    y = model(x)
    between(model)
    y.square().sum().backward()
    return [y, *(p.grad for p in model.parameters())]


@pytest.fixture
def twins():
    kept = tiny(num_classes=3, drop_rate=0.2)
    recomputed = tiny(num_classes=3, drop_rate=0.2, memory_efficient=True)
    recomputed.load_state_dict(kept.state_dict())
    return kept, recomputed


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_recomputation_changes_no_bit(twins, train):
    kept, recomputed = twins
    for seed in range(2):
        x = image(3, h=37, w=64, seed=seed)
        assert same(gradients(kept, x, train), gradients(recomputed, x, train))
    assert same(list(kept.state_dict().values()), list(recomputed.state_dict().values()))  # statistics
    assert recomputed.features.norm0.num_batches_tracked == (2 if train else 0)


def test_gradient_with_respect_to_the_image(twins):
    grads = []
    for model in twins:
        x = image(2).requires_grad_()
        gradients(model, x)
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("train", [True, False], ids=["train then eval", "eval then train"])
def test_the_mode_may_change_between_forward_and_backward(twins, train):
    kept, recomputed = twins
    runs = [gradients(m, image(2), train, between=lambda m: m.train(not train)) for m in twins]
    assert same(*runs)
    assert all(m.training is not train for m in recomputed.modules())
    assert same(list(kept.state_dict().values()), list(recomputed.state_dict().values()))


def test_backward_twice_through_one_graph(twins):
    results = []
    for model in twins:
        torch.manual_seed(3)
        loss = model.train()(image(2)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert same(*results)


def test_a_frozen_stem_still_trains_the_rest(twins):
    for model in twins:
        model.features.conv0.requires_grad_(False)
        model.features.norm0.requires_grad_(False)
    runs = [gradients(model, image(2)) for model in twins]
    assert [g is None for g in runs[0]].count(True) == 3
    assert same(*([g for g in run if g is not None] for run in runs))


def test_without_gradients_nothing_is_recomputed(twins, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("recomputation was prepared")

    monkeypatch.setitem(DenseLayer.first_half_recomputed.__globals__, "checkpoint", refuse)
    kept, recomputed = twins
    with torch.no_grad():
        assert torch.equal(recomputed.eval().forward_modules(image(2)), kept.eval().forward_modules(image(2)))
    with pytest.raises(AssertionError, match="recomputation"):
        recomputed.train()(image(2))


def test_recomputation_does_not_reach_the_engine(twins):
    kept, recomputed = (trained(model).eval() for model in twins)
    with torch.inference_mode():
        exact = copy.deepcopy(kept).double().forward_modules(image(2).double())
        assert_as_accurate(recomputed(image(2)), kept.forward_modules(image(2)), exact)


class PeakMemory(TorchDispatchMode):
    """The largest number of bytes alive at once, of the storages that were made in the block."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size


def peak_of_training_step(depth: int, memory_efficient: bool) -> int:
    """Bytes that forward and backward of one block need at most, without parameters and their gradients."""
    block = DenseBlock(depth, 16, 16, memory_efficient=memory_efficient).train()
    for p in block.parameters():
        p.grad = torch.zeros_like(p)
    x = image(2, 16, 32, 32).requires_grad_()
    with PeakMemory() as memory:
        block(x).sum().backward()
    return memory.peak


def test_memory_grows_linearly_with_depth():
    """Twice the layers need twice the memory; without recomputing, four times in the limit."""
    kept, recomputed = ([peak_of_training_step(depth, mode) for depth in (8, 16)] for mode in (False, True))
    assert recomputed[1] < 2.2 * recomputed[0]
    assert kept[1] > 2.7 * kept[0]
    assert recomputed[1] < 0.5 * kept[1]
