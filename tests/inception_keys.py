"""Names and shapes of state dicts without a public peer in the tests, written out from the published tables.

Deliberately plain: no code is shared with the models. Each function gives a list of (name, shape) in order.
"""


def norm(name: str, channels: int) -> list:
    parts = ("weight", "bias", "running_mean", "running_var")
    return [*((f"{name}.{part}", (channels,)) for part in parts), (f"{name}.num_batches_tracked", ())]


def conv(name: str, inputs: int, outputs: int, height: int, width: int, bias: bool) -> list:
    entries = [(f"{name}.weight", (outputs, inputs, height, width))]
    return [*entries, (f"{name}.bias", (outputs,))] if bias else entries


def linear(name: str, inputs: int, outputs: int) -> list:
    return [(f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,))]


def gate(name: str, channels: int, hidden: int) -> list:
    return [
        *conv(f"{name}.fc1", channels, hidden, 1, 1, True),
        *conv(f"{name}.fc2", hidden, channels, 1, 1, True),
    ]


# in, 1x1, 3x3 reduce, 3x3, double reduce, double 1, double 2, projection, out, hidden channels of the gate
BNINCEPTION = {
    "3a": (192, 64, 64, 64, 64, 96, 96, 32, 256, 16),
    "3b": (256, 64, 64, 96, 64, 96, 96, 64, 320, 20),
    "3c": (320, None, 128, 160, 64, 96, 96, None, 576, 36),
    "4a": (576, 224, 64, 96, 96, 128, 128, 128, 576, 36),
    "4b": (576, 192, 96, 128, 96, 128, 128, 128, 576, 36),
    "4c": (576, 160, 128, 160, 128, 160, 160, 128, 608, 38),
    "4d": (608, 96, 128, 192, 160, 192, 192, 128, 608, 38),
    "4e": (608, None, 128, 192, 192, 256, 256, None, 1056, 66),
    "5a": (1056, 352, 192, 320, 160, 224, 224, 128, 1024, 64),
    "5b": (1024, 352, 192, 320, 192, 224, 224, 128, 1024, 64),
}


def bninception_keys(biased: bool, gated: bool) -> list:
    def both(name: str, inputs: int, outputs: int, size: int) -> list:
        return [*conv(name, inputs, outputs, size, size, biased), *norm(f"{name}_bn", outputs)]

    keys = [
        *both("conv1_7x7_s2", 3, 64, 7),
        *both("conv2_3x3_reduce", 64, 64, 1),
        *both("conv2_3x3", 64, 192, 3),
    ]
    for name, (inputs, one, r3, b3, rd, d1, d2, projection, out, hidden) in BNINCEPTION.items():
        block = f"inception_{name}"
        if one is not None:
            keys += both(f"{block}_1x1", inputs, one, 1)
        keys += both(f"{block}_3x3_reduce", inputs, r3, 1) + both(f"{block}_3x3", r3, b3, 3)
        keys += both(f"{block}_double_3x3_reduce", inputs, rd, 1) + both(f"{block}_double_3x3_1", rd, d1, 3)
        keys += both(f"{block}_double_3x3_2", d1, d2, 3)
        if projection is not None:
            keys += both(f"{block}_pool_proj", inputs, projection, 1)
        if gated:
            keys += gate(f"{block}_se", out, hidden)
    return [*keys, *linear("last_linear", 1024, 1000)]


GOOGLENET = {  # in, 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, projection
    "3a": (192, 64, 96, 128, 16, 32, 32),
    "3b": (256, 128, 128, 192, 32, 96, 64),
    "4a": (480, 192, 96, 208, 16, 48, 64),
    "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64),
    "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128),
    "5a": (832, 256, 160, 320, 32, 128, 128),
    "5b": (832, 384, 192, 384, 48, 128, 128),
}


def plain_googlenet_keys() -> list:
    """The network of the paper: no batch norm, biases, real 5x5."""

    def one(name: str, inputs: int, outputs: int, size: int) -> list:
        return conv(f"{name}.conv", inputs, outputs, size, size, True)

    keys = [*one("conv1", 3, 64, 7), *one("conv2", 64, 64, 1), *one("conv3", 64, 192, 3)]
    for name, (inputs, b1, r3, b3, r5, b5, projection) in GOOGLENET.items():
        block = f"inception{name}"
        keys += one(f"{block}.branch1", inputs, b1, 1)
        keys += one(f"{block}.branch2.0", inputs, r3, 1) + one(f"{block}.branch2.1", r3, b3, 3)
        keys += one(f"{block}.branch3.0", inputs, r5, 1) + one(f"{block}.branch3.1", r5, b5, 5)
        keys += one(f"{block}.branch4.1", inputs, projection, 1)
    for head, inputs in (("aux1", 512), ("aux2", 528)):
        keys += one(f"{head}.conv", inputs, 128, 1)
        keys += linear(f"{head}.fc1", 2048, 1024) + linear(f"{head}.fc2", 1024, 1000)
    return [*keys, *linear("fc", 1024, 1000)]


def inception_v3_gates() -> dict:
    outputs = {
        "5b": (256, 16), "5c": (288, 18), "5d": (288, 18), "6a": (768, 48), "6b": (768, 48), "6c": (768, 48),
        "6d": (768, 48), "6e": (768, 48), "7a": (1280, 80), "7b": (2048, 128), "7c": (2048, 128),
    }  # fmt: skip
    return {key: shape for name, sizes in outputs.items() for key, shape in gate(f"Mixed_{name}.se", *sizes)}


def inception_resnet_v1_keys(head: str, classes: int) -> list:
    """The reference's names: `embedding` (with `logits` where there are classes) or `imagenet`."""

    def one(name: str, inputs: int, outputs: int, height: int = 1, width: int = 1) -> list:
        return [*conv(f"{name}.conv", inputs, outputs, height, width, False), *norm(f"{name}.bn", outputs)]

    keys = [*one("conv2d_1a", 3, 32, 3, 3), *one("conv2d_2a", 32, 32, 3, 3), *one("conv2d_2b", 32, 64, 3, 3)]
    keys += [*one("conv2d_3b", 64, 80), *one("conv2d_4a", 80, 192, 3, 3), *one("conv2d_4b", 192, 256, 3, 3)]
    for i in range(5):
        block = f"repeat_1.{i}"
        keys += one(f"{block}.branch0", 256, 32)
        keys += one(f"{block}.branch1.0", 256, 32) + one(f"{block}.branch1.1", 32, 32, 3, 3)
        keys += one(f"{block}.branch2.0", 256, 32) + one(f"{block}.branch2.1", 32, 32, 3, 3)
        keys += one(f"{block}.branch2.2", 32, 32, 3, 3) + conv(f"{block}.conv2d", 96, 256, 1, 1, True)
    keys += one("mixed_6a.branch0", 256, 384, 3, 3) + one("mixed_6a.branch1.0", 256, 192)
    keys += one("mixed_6a.branch1.1", 192, 192, 3, 3) + one("mixed_6a.branch1.2", 192, 256, 3, 3)
    for i in range(10):
        block = f"repeat_2.{i}"
        keys += one(f"{block}.branch0", 896, 128) + one(f"{block}.branch1.0", 896, 128)
        keys += one(f"{block}.branch1.1", 128, 128, 1, 7) + one(f"{block}.branch1.2", 128, 128, 7, 1)
        keys += conv(f"{block}.conv2d", 256, 896, 1, 1, True)
    keys += one("mixed_7a.branch0.0", 896, 256) + one("mixed_7a.branch0.1", 256, 384, 3, 3)
    keys += one("mixed_7a.branch1.0", 896, 256) + one("mixed_7a.branch1.1", 256, 256, 3, 3)
    keys += one("mixed_7a.branch2.0", 896, 256) + one("mixed_7a.branch2.1", 256, 256, 3, 3)
    keys += one("mixed_7a.branch2.2", 256, 256, 3, 3)
    for block in [*(f"repeat_3.{i}" for i in range(5)), "block8"]:
        keys += one(f"{block}.branch0", 1792, 192) + one(f"{block}.branch1.0", 1792, 192)
        keys += one(f"{block}.branch1.1", 192, 192, 1, 3) + one(f"{block}.branch1.2", 192, 192, 3, 1)
        keys += conv(f"{block}.conv2d", 384, 1792, 1, 1, True)
    if head == "imagenet":
        return keys + linear("last_linear", 1792, classes)
    keys += [("last_linear.weight", (512, 1792)), *norm("last_bn", 512)]
    return keys + (linear("logits", 512, classes) if classes else [])
