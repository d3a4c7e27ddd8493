"""Batch normalisation, against torch's; and its ternary scales."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from difflut_lab.errors import ConfigError
from difflut_lab.ternary import TernaryBatchNorm


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
@pytest.mark.parametrize("affine", [True, False])
# as many channels as columns, and as samples: dimensions that are easily confused
@pytest.mark.parametrize("shape", [(8, 5), (5, 5), (6, 5, 3, 5), (5, 5, 5, 5), (1, 5, 2, 5)])
def test_is_that_of_torch(shape: tuple[int, ...], affine: bool, momentum: float | None) -> None:
    norms = [TernaryBatchNorm(5, momentum=momentum, affine=affine)]
    norms.append((nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5, momentum=momentum, affine=affine))  # type: ignore[arg-type]  # the same constructor
    scales, shifts = torch.randn(5), torch.randn(5)
    for norm in norms:
        if affine:
            nn.init.zeros_(norm.bias).data += shifts
            nn.init.zeros_(norm.weight).data += scales
    for step in range(3):
        x = (step + 1) * torch.randn(shape) + 2
        inputs = [x.clone().requires_grad_() for _ in norms]
        outputs = [norm(values) for norm, values in zip(norms, inputs, strict=True)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().mul(torch.arange(output.numel()).view_as(output)).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    assert norms[0].running_mean is not None and norms[0].running_var is not None
    # running averages are of the unbiased variance
    torch.testing.assert_close(norms[0].state_dict(), norms[1].state_dict())
    x = torch.randn(shape)
    torch.testing.assert_close(norms[0].eval()(x), norms[1].eval()(x))


def test_one_value_per_feature_cannot_be_normalised_in_training() -> None:
    norm = TernaryBatchNorm(4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.randn(1, 4))
    assert norm.eval()(torch.randn(1, 4)).shape == (1, 4)


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 2), (3, 2, 4, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expects inputs \(B, 4\) or \(B, 4, H, W\)"):
        TernaryBatchNorm(4)(torch.randn(shape))


def test_ternary_scales_have_one_magnitude_and_switch_features_off() -> None:
    norm = TernaryBatchNorm(4, quantizer="absmean")
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.2, -0.8, 0.1, 0.9]))
    x = torch.randn(16, 4)
    plain = nn.functional.batch_norm(x, None, None, training=True)
    y = norm(x)
    torch.testing.assert_close(y, plain * 0.75 * torch.tensor([1.0, -1.0, 0.0, 1.0]))
    (gradient,) = torch.autograd.grad(y, norm.weight, torch.randn(16, 4))
    assert (gradient != 0).all()
    assert TernaryBatchNorm(4, quantizer="absmean").eval()(x).allclose(nn.BatchNorm1d(4).eval()(x))


def test_a_quantizer_needs_scales() -> None:
    with pytest.raises(ConfigError, match="affine=False: there is no gamma"):
        TernaryBatchNorm(4, affine=False, quantizer="absmean")
