"""Schedules, parameter groups, batch-norm momentum and the recipes made of them."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import fast_backbones as fb
from fast_backbones import training
from fast_backbones.training import RECIPES, parameter_groups, recipe, set_batch_norm_momentum


def optimizer(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)


def rates(schedule, epochs: int) -> list[float]:
    """The learning rate of each epoch."""
    seen = []
    for _ in range(epochs):
        seen.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return seen


# ---- schedules ----


@pytest.mark.parametrize(
    ("make", "formula"),
    [
        (training.inception_schedule, lambda epoch: 0.94 ** (epoch // 2)),
        (training.googlenet_schedule, lambda epoch: 0.96 ** (epoch // 8)),
        (training.senet_schedule, lambda epoch: 0.1 ** (epoch // 30)),
        (training.step_schedule, lambda epoch: 0.1 ** ((epoch >= 30) + (epoch >= 60))),
    ],
    ids=["0.94 every two", "4 % every eight", "a tenth every thirty", "a tenth at 30 and 60"],
)
def test_schedules_are_the_papers(make, formula):
    assert rates(make(optimizer()), 100) == pytest.approx([formula(epoch) for epoch in range(100)])


def test_plateau_divides_three_times_and_no_more():
    schedule = training.plateau_schedule(optimizer(0.01), patience=1)
    seen = []
    for _ in range(20):
        schedule.step(1.0)
        seen.append(schedule.optimizer.param_groups[0]["lr"])
    assert sorted(set(seen), reverse=True) == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5])


def test_plateau_waits_while_the_error_falls():
    schedule = training.plateau_schedule(optimizer(), times=None, patience=1)
    for epoch in range(20):
        schedule.step(1.0 / (1 + epoch))
    assert schedule.optimizer.param_groups[0]["lr"] == 1.0


def test_plateau_counts_the_smallest_progress():
    """Errors that fall by a millionth fall; the rate drops at the third epoch without a new smallest one."""
    schedule = training.plateau_schedule(optimizer(), patience=2)
    for epoch in range(30):
        schedule.step(1.0 - 1e-6 * epoch)
    assert schedule.optimizer.param_groups[0]["lr"] == 1.0
    seen = []
    for _ in range(4):
        schedule.step(1.0)
        seen.append(schedule.optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([1.0, 1.0, 0.1, 0.1])


@pytest.mark.parametrize("kind", [torch.optim.SGD, training.RMSPropTF])
def test_plateau_divides_a_shared_tensor_once(kind):
    """The rate of all groups may be one tensor, which schedules change in place."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(3)]
    shared = kind(groups, torch.tensor(0.5))
    schedule = training.plateau_schedule(shared, patience=0)
    seen = []
    for _ in range(6):
        schedule.step(1.0)
        seen.append([float(group["lr"]) for group in shared.param_groups])
    assert [rate[0] for rate in seen] == pytest.approx([0.5, 0.05, 0.005, 0.0005, 0.0005, 0.0005])
    assert all(len(set(rate)) == 1 for rate in seen)


SCHEDULES = (
    training.inception_schedule,
    training.googlenet_schedule,
    training.senet_schedule,
    training.step_schedule,
    training.plateau_schedule,
)


def run_epochs(schedule, first: int, last: int) -> list[list[float]]:
    """The rates of all groups in these epochs, under an error that stalls in between."""
    seen = []
    for epoch in range(first, last):
        schedule.optimizer.step()
        error = (max(1.0 - 0.1 * epoch, 0.5),) if hasattr(schedule, "patience") else ()
        schedule.step(*error)
        seen.append([group["lr"] for group in schedule.optimizer.param_groups])
    return seen


@pytest.mark.parametrize("order", ["schedule made before loading", "schedule made after loading"])
@pytest.mark.parametrize("make", SCHEDULES, ids=lambda make: make.__name__)
def test_schedules_continue_from_their_state_dicts(make, order):
    def fresh() -> torch.optim.Optimizer:
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.02)]
        return training.RMSPropTF(groups)

    whole = run_epochs(make(fresh()), 0, 70)
    first = make(fresh())
    start = run_epochs(first, 0, 33)
    saved = copy.deepcopy((first.optimizer.state_dict(), first.state_dict()))
    resumed = fresh()
    schedule = make(resumed) if order == "schedule made before loading" else None
    resumed.load_state_dict(saved[0])
    schedule = schedule or make(resumed)
    schedule.load_state_dict(saved[1])
    assert start + run_epochs(schedule, 33, 70) == whole
    assert whole[-1] != whole[0]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (training.inception_schedule, {"factor": 1.0}, "factor must be between 0 and 1, got 1.0"),
        (training.googlenet_schedule, {"every": 0}, "every must be at least 1 epoch, got 0"),
        (training.step_schedule, {"milestones": (60, 30)}, "increasing epochs"),
        (training.step_schedule, {"milestones": ()}, "increasing epochs"),
        (training.plateau_schedule, {"times": 0}, "times must be at least 1, got 0"),
    ],
)
def test_schedules_refuse(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(optimizer(), **options)


# ---- parameter groups, batch norm ----


class Separable(nn.Module):
    """One parameter of each kind, some of them twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.depthwise = nn.Conv2d(4, 8, 3, groups=4, bias=False)  # a multiplier of two
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, bias=False)
        self.fc = nn.Linear(8, 3)
        self.tied = nn.Linear(8, 3)
        self.tied.weight = self.fc.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_each_parameter_is_in_the_group_of_its_kind():
    model = Separable()
    groups = {g["name"]: g for g in parameter_groups(model, 1e-4, depthwise=0.0, biases=1e-6, norms=0.0)}
    assert list(groups) == ["weights", "depthwise", "biases", "norms"]
    expected = {
        "weights": [model.stem.weight, model.grouped.weight, model.fc.weight],
        "depthwise": [model.depthwise.weight],
        "biases": [model.stem.bias, model.fc.bias, model.tied.bias],
        "norms": [model.norm.weight, model.norm.bias],
    }
    for name, parameters in expected.items():
        assert [id(p) for p in groups[name]["params"]] == [id(p) for p in parameters]
    assert [g["weight_decay"] for g in groups.values()] == [1e-4, 0.0, 1e-6, 0.0]


def test_without_options_every_kind_decays_alike():
    assert {g["weight_decay"] for g in parameter_groups(Separable(), 1e-4)} == {1e-4}
    assert [g["name"] for g in parameter_groups(nn.Linear(2, 2, bias=False), 1e-4)] == ["weights"]


def test_groups_go_into_an_optimizer_and_decay_what_they_say():
    model = Separable()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.optim.SGD(parameter_groups(model, 0.5, depthwise=0.0, norms=0.0), 1.0).step()
    for name, p in model.named_parameters():
        kept = name.split(".")[0] in ("depthwise", "norm", "frozen")
        torch.testing.assert_close(p.detach(), before[name] * (1.0 if kept else 0.5))


def test_negative_decay_is_refused():
    with pytest.raises(ValueError, match="weight decay of depthwise must not be negative, got -1"):
        parameter_groups(Separable(), 1e-4, depthwise=-1)


def test_batch_norm_momentum_is_that_of_the_statistics():
    model = Separable()
    assert set_batch_norm_momentum(model) == 1
    model.norm.train()(torch.ones(4, 8, 2, 2))
    torch.testing.assert_close(model.norm.running_mean, torch.full((8,), 0.0003))
    assert set_batch_norm_momentum(nn.Linear(1, 1)) == 0
    assert set_batch_norm_momentum(fb.resnet18(num_classes=0), None) == 20
    with pytest.raises(ValueError, match="momentum must be from 0 to 1 or None, got 3"):
        set_batch_norm_momentum(model, 3)


# ---- recipes ----

PUBLISHED = {  # optimizer, learning rate, weight decay, batch, epochs, label smoothing
    "alexnet": ("sgd", 0.01, 5e-4, 128, 90, 0.0),
    "vgg": ("sgd", 0.01, 5e-4, 256, 74, 0.0),
    "googlenet": ("sgd", None, None, None, None, 0.0),
    "inception_v3": ("rmsprop_tf", 0.045, 4e-5, 32, 100, 0.1),
    "inception_v4": ("rmsprop_tf", 0.045, 4e-5, 32, 100, 0.0),
    "inception_resnet": ("rmsprop_tf", 0.045, 4e-5, 32, 100, 0.0),
    "resnet": ("sgd", 0.1, 1e-4, 256, None, 0.0),
    "resnext": ("sgd", 0.1, 1e-4, 256, None, 0.0),
    "xception": ("sgd", 0.045, 1e-5, None, None, 0.0),
    "densenet": ("sgd", 0.1, 1e-4, 256, 90, 0.0),
    "mobilenet": ("rmsprop_tf", 0.045, 4e-5, None, None, 0.0),
    "senet": ("sgd", 0.6, 1e-4, 1024, 100, 0.0),
    "senet154": ("sgd", 0.6, 1e-4, 1024, 100, 0.1),
}


def test_recipes_hold_the_published_values():
    found = {
        name: (r.optimizer, r.learning_rate, r.weight_decay, r.batch_size, r.epochs, r.label_smoothing)
        for name, r in RECIPES.items()
    }
    assert found == PUBLISHED
    assert all(r.momentum == 0.9 for r in RECIPES.values())
    assert [name for name, r in RECIPES.items() if r.nesterov] == ["densenet"]
    assert {name: r.aux_weight for name, r in RECIPES.items() if r.aux_weight is not None} == {
        "googlenet": 0.3,
        "inception_v3": 0.4,
    }
    clipped = {name: r.clip_norm for name, r in RECIPES.items() if r.clip_norm is not None}
    assert clipped == {"inception_v3": 2.0, "inception_v4": 2.0, "inception_resnet": 2.0}
    assert (recipe("inception_v3").replicas, recipe("inception_v4").replicas) == (50, 20)
    assert (recipe("inception_v3").alpha, recipe("inception_v3").eps) == (0.9, 1.0)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_its_parts(name):
    made = RECIPES[name]
    assert recipe(name) is made
    if made.learning_rate is None:
        with pytest.raises(ValueError, match=r"names no learning_rate: use recipe\.replace\(learning_rate"):
            made.make_optimizer(Separable())
        made = made.replace(learning_rate=0.01, weight_decay=2e-4)
    model = Separable()
    chosen = made.make_optimizer(model)
    assert isinstance(chosen, training.RMSPropTF if made.optimizer == "rmsprop_tf" else torch.optim.SGD)
    for group in chosen.param_groups:
        assert group["lr"] == made.learning_rate
        assert group["momentum"] == made.momentum
        assert group.get("nesterov", False) == made.nesterov
        own = made.depthwise_weight_decay if group["name"] == "depthwise" else None
        assert group["weight_decay"] == (made.weight_decay if own is None else own)
    schedule = made.make_schedule(chosen)
    assert hasattr(schedule, "step")
    assert made.make_loss().label_smoothing == made.label_smoothing
    average = made.make_average(model)
    assert (average is None) == (made.average_decay is None)
    assert average is None or average.decay == 0.9999


def test_mobilenets_depthwise_filters_do_not_decay():
    made = recipe("mobilenet").make_optimizer(Separable())
    assert {g["name"]: g["weight_decay"] for g in made.param_groups} == {
        "weights": 4e-5,
        "depthwise": 0.0,
        "biases": 4e-5,
        "norms": 4e-5,
    }


WITHOUT = ("lenet5", "lenet5_1998", "bninception", "inception_v2", "bn_inception")


@pytest.mark.parametrize("name", fb.list_models())
def test_every_model_has_a_recipe_or_a_reason(name):
    if name in WITHOUT:
        with pytest.raises(ValueError, match=f"no recipe for '{name}'; there is one for alexnet, densenet"):
            recipe(name)
    else:
        assert recipe(name).name in RECIPES


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("resnext50_32x4d", "resnext"),
        ("legacy_seresnet50", "senet"),
        ("seresnext26_32x4d", "senet"),
        ("legacy_senet154", "senet154"),
        ("senet154", "senet154"),
        ("inception_resnet_v2", "inception_resnet"),
        ("se_inception_resnet_v2", "senet"),
        ("inception_v1", "googlenet"),
        ("googlenet_2014", "googlenet"),
        ("caffe_alexnet", "alexnet"),
        ("legacy_xception", "xception"),
        ("mobilenetv1_025", "mobilenet"),
        ("vgg16_bn", "vgg"),
    ],
)
def test_models_find_their_family(model, family):
    assert recipe(model).name == family


def test_recipes_are_frozen_and_replaceable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("resnet").learning_rate = 1.0
    changed = recipe("resnet").replace(learning_rate=0.05, schedule="step", schedule_options=())
    assert recipe("resnet").learning_rate == 0.1
    assert rates(changed.make_schedule(changed.make_optimizer(Separable())), 31)[-1] == pytest.approx(0.005)


@pytest.mark.parametrize(("field", "make"), [("optimizer", "make_optimizer"), ("schedule", "make_schedule")])
def test_unknown_parts_are_named(field, make):
    broken = recipe("resnet").replace(**{field: "adam"})
    with pytest.raises(ValueError, match=f"{field} must be .*, got 'adam'"):
        getattr(broken, make)(Separable() if field == "optimizer" else optimizer())
