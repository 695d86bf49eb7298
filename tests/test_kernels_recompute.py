"""Maps that backward computes again: the right ones, or an error, whatever happens in between."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_bit_equal, needs_native
from model_checks import image
from torch import nn

from fast_backbones import kernels

pytestmark = needs_native


def test_a_changed_input_of_the_norm_is_an_error_not_a_wrong_gradient():
    conv, norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
    x = image(2, 8, 6, 6).requires_grad_()
    h = x * 1
    y = kernels.batch_norm(h, norm.weight, norm.bias, activation="relu")
    z = kernels.conv2d(y, conv.weight, conv.bias)
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_a_map_changed_behind_the_norm_is_kept_itself():
    def weight_gradient(norm):
        conv = nn.Conv2d(8, 8, 1)
        torch.manual_seed(1)
        nn.init.normal_(conv.weight)
        y = norm(image(2, 8, 6, 6).requires_grad_())
        y.mul_(3)
        kernels.conv2d(y, conv.weight).square().sum().backward()
        return conv.weight.grad

    ours = weight_gradient(lambda x: kernels.batch_norm(x, activation="none"))
    plain = weight_gradient(lambda x: F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_a_bias_that_changes_later_does_not_change_gradients():
    x, weight = image(2, 8, 6, 6).requires_grad_(), image(4, 8, 1, 1).requires_grad_()

    def gradient(change):
        bias = torch.zeros(8, requires_grad=True)
        y = kernels.batch_norm(x, None, bias, activation="relu")
        if change:
            with torch.no_grad():
                bias.add_(1)
        return torch.autograd.grad(kernels.conv2d(y, weight).square().sum(), weight)[0]

    assert_bit_equal(gradient(change=True), gradient(change=False))


def test_a_map_that_somebody_looks_at_is_kept_itself():
    x, weight = image(2, 8, 6, 6).requires_grad_(), image(4, 8, 1, 1).requires_grad_()
    y = kernels.batch_norm(x, activation="relu")
    y.retain_grad()
    (first,) = torch.autograd.grad(kernels.conv2d(y, weight).square().sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), y)
    plain = y.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(
        F.conv2d(plain, exact_weight).square().sum(), exact_weight, create_graph=True
    )
    (exact,) = torch.autograd.grad(first.square().sum(), plain)
    assert (second.double() - exact).norm() < 1e-6 * exact.norm()


def test_a_map_is_saved_and_copied_without_its_source():
    y = kernels.batch_norm(image(2, 8, 6, 6).requires_grad_(), activation="relu")
    file = io.BytesIO()
    torch.save([y], file)
    file.seek(0)
    (loaded,) = torch.load(file)
    for other in (loaded, copy.deepcopy(y.detach_())):
        assert_bit_equal(other.detach(), y)
        kernels.conv2d(other.requires_grad_(), image(4, 8, 1, 1)).sum().backward()
