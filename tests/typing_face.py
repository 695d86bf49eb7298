"""The public face as a type checker sees it: `make types` runs pyright on this file, strict. Nobody runs it.

Every public name is used once with the types its docstring promises; what is inferred is written down by
`assert_type`, so that an annotation that is lost or wrong is an error here.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fast_backbones as fb
from fast_backbones import backbones, engine, kernels, training

x = torch.empty(1, 8, 8, 8)
w = torch.empty(8, 8, 3, 3)
vector = torch.empty(8)


def ops() -> None:
    assert_type(kernels.conv2d(x, w, vector, stride=1, padding=(1, 1), activation="relu", residual=x), Tensor)
    assert_type(kernels.grouped_conv2d(x, w, vector, groups=1), Tensor)
    assert_type(kernels.pointwise_conv2d(x, w, vector, backend="reference"), Tensor)
    assert_type(kernels.stem_conv2d(x, w, vector), Tensor)
    assert_type(kernels.separable_conv2d(x, w, w), Tensor)
    assert_type(kernels.depthwise_conv2d(x, w, vector), Tensor)
    assert_type(kernels.max_pool2d(x, 3, stride=2, padding=1), Tensor)
    assert_type(kernels.avg_pool2d(x, 3, stride=2), Tensor)
    assert_type(kernels.global_avg_pool(x), Tensor)
    assert_type(kernels.linear(vector, w, vector), Tensor)
    assert_type(kernels.local_response_norm(x, 5), Tensor)
    assert_type(kernels.l2_normalize(x, eps=1e-6), Tensor)
    assert_type(kernels.squared_distances(x, w), Tensor)
    assert_type(kernels.squeeze_excite(x, w, vector, w, vector), Tensor)
    assert_type(kernels.batch_norm(x, vector, vector, vector, vector, training=False), Tensor)
    assert_type(kernels.softmax_cross_entropy(x, vector, label_smoothing=0.1), Tensor)
    assert_type(kernels.batch_norm_conv2d(x, vector, vector, vector, vector, w, padding=1), Tensor)


def formulas() -> None:
    assert_type(kernels.conv2d_ref(x, w, vector, stride=1, padding="same"), Tensor)
    assert_type(kernels.grouped_conv2d_ref(x, w, vector, groups=1), Tensor)
    assert_type(kernels.pointwise_conv2d_ref(x, w, vector), Tensor)
    assert_type(kernels.stem_conv2d_ref(x, w, vector), Tensor)
    assert_type(kernels.separable_conv2d_ref(x, w, w), Tensor)
    assert_type(kernels.depthwise_conv2d_ref(x, w, vector), Tensor)
    assert_type(kernels.max_pool2d_ref(x, 3), Tensor)
    assert_type(kernels.avg_pool2d_ref(x, 3), Tensor)
    assert_type(kernels.global_avg_pool_ref(x), Tensor)
    assert_type(kernels.linear_ref(vector, w, vector), Tensor)
    assert_type(kernels.local_response_norm_ref(x, 5), Tensor)
    assert_type(kernels.l2_normalize_ref(x), Tensor)
    assert_type(kernels.squared_distances_ref(x, w), Tensor)
    assert_type(kernels.squeeze_excite_ref(x, w, vector, w, vector), Tensor)
    assert_type(kernels.batch_norm_ref(x, vector, vector), Tensor)
    assert_type(kernels.softmax_cross_entropy_ref(x, vector), Tensor)
    assert_type(kernels.batch_norm_conv2d_ref(x, vector, vector, vector, vector, w), Tensor)


def dispatch() -> None:
    with kernels.backend("reference"), fb.backend("native"):
        assert_type(kernels.current_backend(), str)
    print(kernels.explain("conv2d", x, w, padding=1), kernels.ops(), fb.build_info()["native"])
    print(kernels.memory.usage(), kernels.memory.release())


def models() -> None:
    assert_type(fb.resnet18(num_classes=10, features_only=True, out_indices=(1, 2)), backbones.ResNet)
    assert_type(fb.create_model("resnet18", num_classes=10), nn.Module)
    assert_type(fb.list_models("*resnet*", family="ResNet"), list[str])
    assert_type(fb.list_families(), list[str])
    info = assert_type(fb.model_info("resnet18"), backbones.ModelInfo)
    assert_type(info.gmacs, float)
    assert_type(info.tap_channels, tuple[int, ...])
    report = assert_type(fb.load_weights(fb.resnet18(), "file.pth", head="strict"), backbones.WeightsReport)
    print(report)
    model = fb.lenet5(weights="file.pth")
    assert_type(model.forward_features(x), Tensor)
    assert_type(model.forward_taps(x), list[Tensor])
    assert_type(model.forward_head(x, pre_logits=True), Tensor)
    assert_type(model.get_classifier(), nn.Module)
    assert_type(model.num_features, int)
    model.reset_classifier(5)
    print(assert_type(model.feature_info, backbones.FeatureInfo).channels(), model.default_cfg["input_size"])
    assert_type(info.preprocessing, backbones.Preprocessing)
    to_input: Callable[..., Tensor] = fb.transforms_for(model)
    assert_type(to_input(x), Tensor)
    try:
        fb.resnet18(weights={"a": x})
    except (fb.WeightsError, fb.WeightsNotFoundError) as error:
        print(error)


@fb.register_model(family="mine", aliases=("other",))
def mine(weights: str | None = None) -> nn.Module:
    return nn.Identity()


def families() -> list[nn.Module]:
    """One of each class and each function that takes more than a name."""
    return [
        assert_type(fb.alexnet(), backbones.AlexNet),
        assert_type(fb.alexnet_2012(), backbones.AlexNet2012),
        assert_type(fb.bninception(), backbones.BNInception),
        assert_type(fb.densenet(32, (6, 12)), backbones.DenseNet),
        assert_type(fb.googlenet(), backbones.GoogLeNet),
        assert_type(fb.inception_resnet_v1(), backbones.InceptionResNetV1),
        assert_type(fb.inception_resnet_v2(), backbones.InceptionResNetV2),
        assert_type(fb.inception_v3(), backbones.InceptionV3),
        assert_type(fb.inception_v4(), backbones.InceptionV4),
        assert_type(fb.lenet5(), backbones.LeNet5),
        assert_type(fb.mobilenetv1(0.5), backbones.MobileNetV1),
        assert_type(fb.resnext(50, 32, 4), backbones.ResNet),
        assert_type(fb.legacy_seresnet18(), backbones.SENet),
        assert_type(fb.vgg11(), backbones.VGG),
        assert_type(fb.xception(), backbones.Xception),
        assert_type(mine("file"), nn.Module),
    ]


def outputs_in_training(found: backbones.GoogLeNetOutput, other: backbones.InceptionV3Output) -> list[Tensor]:
    return [found.logits, other.logits]


def any_backbone(model: backbones.Backbone) -> nn.Module:
    return model


def plans(model: nn.Module) -> None:
    assert_type(fb.optimize_(nn.Sequential(), dynamic_batch=False), nn.Sequential)
    assert_type(fb.revert_(nn.Sequential()), nn.Sequential)
    assert_type(engine.why_not(model, x), str | None)
    assert_type(engine.why_not_fused(model, x), str | None)
    plan = assert_type(engine.plan_for(model, x), engine.Plan)
    assert_type(engine.plan_summary(plan), str)
    assert_type([step.kernel for step in plan.steps], list[str])
    assert_type(fb.explain(model, x, repeats=1), engine.Explanation)
    print(assert_type(fb.tune(model, x), engine.Tuning), engine.launches_for(model, x))
    engine.refresh(model)
    fb.save_plan(model, x, "net.plan", weights="both", dynamic_batch=True)
    try:
        loaded = assert_type(fb.load_plan("net.plan"), engine.LoadedPlan)
        print(loaded.images, loaded(x))
    except (engine.PlanFileError, engine.PlanFileNotFoundError):
        pass


def recipes(model: nn.Module) -> None:
    recipe = assert_type(training.recipe("resnet"), training.Recipe)
    assert_type(recipe.replace(learning_rate=0.1), training.Recipe)
    optimizer = assert_type(recipe.make_optimizer(model), torch.optim.Optimizer)
    recipe.make_schedule(optimizer)
    assert_type(recipe.make_average(model), training.ExponentialMovingAverage | None)
    assert_type(training.RECIPES, dict[str, training.Recipe])
    assert_type(training.label_smoothing_cross_entropy(x, vector, label_smoothing=0.1), Tensor)
    assert_type(training.auxiliary_loss(x, vector), Tensor)
    training.RMSPropTF(model.parameters(), lr=0.1).step()
    training.set_batch_norm_momentum(model, training.TF_BATCH_NORM_MOMENTUM)
    print(training.parameter_groups(model, 1e-4, depthwise=None), training.INCEPTION_CLIP_NORM)
    print(training.GOOGLENET_AUX_WEIGHT, training.INCEPTION_V3_AUX_WEIGHT, training.INCEPTION_AVERAGE_DECAY)
    print(training.step_schedule(optimizer), training.inception_schedule(optimizer))
    print(training.googlenet_schedule(optimizer), training.senet_schedule(optimizer))
    print(training.plateau_schedule(optimizer))
    average = training.ExponentialMovingAverage(model, decay=0.99)
    average.update()
    with average.applied():
        training.LabelSmoothingCrossEntropy(0.1)(x, vector)
