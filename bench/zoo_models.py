"""The networks of `python -m bench.zoo`: convolutional ones of timm and torchvision that are not ours.

A name is "library/model". Of each family there is a small member: what an engine cannot do shows there, too.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from .subject import calibrate, input_size

TIMM = """
    resnet26d resnet50d resnetaa50d resnetblur50 ecaresnet26t seresnet50 gcresnet33ts resnest26d skresnet18
    skresnet50 res2net50_26w_4s res2net50d tresnet_m resnetv2_50 resnetv2_50x1_bit wide_resnet50_2
    regnetx_004 regnety_004 regnetz_b16 efficientnet_b0 efficientnet_b1 efficientnet_lite0 efficientnet_es
    efficientnet_blur_b0 tf_efficientnet_b0 tf_efficientnetv2_b0 efficientnetv2_rw_t mobilenetv2_100
    mobilenetv3_large_100 mobilenetv3_small_100 mobilenetv4_conv_small mobilenetv4_conv_medium mnasnet_100
    semnasnet_100 spnasnet_100 fbnetc_100 fbnetv3_b hardcorenas_a mixnet_s tinynet_a lcnet_100 rexnet_100
    gernet_s selecsls42b dpn68 dpn68b pnasnet5large nasnetalarge hrnet_w18_small dla34 dla46x_c
    dla60_res2net vovnet39a ese_vovnet19b_dw ese_vovnet39b ghostnet_100 ghostnetv2_100 repghostnet_100
    cspresnet50 cspresnext50 cspdarknet53 darknet53 repvgg_a0 repvgg_d2se mobileone_s0 convnext_atto
    convnextv2_atto nfnet_l0 dm_nfnet_f0 eca_nfnet_l0 inception_next_atto hgnetv2_b0 starnet_s1 fastvit_t8
    xception41 poolformer_s12 rdnet_tiny
"""
TORCHVISION = """
    alexnet vgg11_bn googlenet inception_v3 resnet50 resnext50_32x4d densenet121 squeezenet1_0 squeezenet1_1
    shufflenet_v2_x0_5 shufflenet_v2_x1_0 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet1_0
    efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf convnext_tiny
"""
ZOO = (
    *(f"timm/{name}" for name in TIMM.split()),
    *(f"torchvision/{name}" for name in TORCHVISION.split()),
)
LIBRARIES = ("timm", "torchvision")
SIDE = 224  # pixels, but where a network wants more
SIDES = {"timm/pnasnet5large": 331, "timm/nasnetalarge": 331, "torchvision/inception_v3": 299}
NEUTRAL = 1e-2  # scales up to here multiply a branch away


def load(library: str):
    """timm or torchvision, also beside a PyTorch that cannot load torchvision's compiled operators, which no
    network here calls. ModuleNotFoundError when it is not installed."""
    vision = importlib.util.find_spec("torchvision")
    for compiled in Path(vision.origin).parent.glob("_C*.so") if vision else ():
        try:
            torch.ops.load_library(compiled)
        except OSError:
            if not hasattr(torch.ops.torchvision, "nms"):
                load.stub = torch.library.Library("torchvision", "DEF")  # lives as long as the process
                for name in ("nms", "qnms"):
                    load.stub.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(library)


def make(name: str, seed: int = 0) -> nn.Module:
    """The network in eval mode, seeded, with numbers as after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = plain(name)
        distinguish(model, seed)
        calibrate(model, image(name, model, 2, seed), seed)
        return level(model).eval()


def plain(name: str) -> nn.Module:
    """The network in eval mode as its library initialises it, never with downloaded weights.

    ModuleNotFoundError when the library is not installed, ValueError when it has no such network.
    """
    library, _, model_name = name.partition("/")
    module = load(library)
    if library == "timm":
        if not module.is_model(model_name):
            close = module.list_models(f"*{model_name}*")
            raise ValueError(f"timm has no model {model_name!r}{suggestion(close)}")
        return module.create_model(model_name, pretrained=False).eval()
    models = importlib.import_module("torchvision.models")
    if model_name not in models.list_models(module=models):
        close = models.list_models(module=models, include=f"*{model_name}*")
        raise ValueError(f"torchvision has no classification model {model_name!r}{suggestion(close)}")
    slow = {"init_weights": False} if model_name in ("googlenet", "inception_v3") else {}
    return models.get_model(model_name, weights=None, **slow).eval()


def suggestion(close: list[str]) -> str:
    return f": {', '.join(close[:3])}?" if close else ""


def size(name: str, model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width that the network was made for."""
    if name in SIDES:
        return (input_size(model)[0], SIDES[name], SIDES[name])
    return input_size(model)


def image(name: str, model: nn.Module, batch: int, seed: int = 0) -> Tensor:
    """Standard normal noise, [batch, C, H, W]."""
    channels, side = input_size(model)[0], SIDES.get(name, SIDE)
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(seed))


def level(model: nn.Module) -> nn.Module:
    """No channel of a batch norm varies far less than the others: two images leave such channels where maps
    have one pixel, and a norm that divides by next to nothing makes rounding as large as the signal."""
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        if norm.running_var is not None:
            norm.running_var.clamp_(min=0.1 * norm.running_var.mean().item())
    return model


def distinguish(model: nn.Module, seed: int = 0) -> None:
    """No parameter keeps one value for all channels: an engine that loses a bias or a scale must be caught.

    Biases get a normal distribution of width 0.1, scales half to one and a half of their value, and scales
    that start near zero (of whole branches: skipped, they would prove nothing) 0.15 to 0.45.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            first = parameter.flatten()[:1]
            if not parameter.is_floating_point() or not first.numel() or (parameter != first).any():
                continue
            if name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
            else:
                scale = 0.3 if first.abs() <= NEUTRAL else first
                parameter.copy_(scale * (torch.rand(parameter.shape, generator=draw) + 0.5))
