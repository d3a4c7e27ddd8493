from __future__ import annotations

import pytest
import torch

from difflut_lab import REGISTRY, schema
from difflut_lab.errors import ConfigError
from difflut_lab.heads import GroupSum


def test_counts_contiguous_groups() -> None:
    head = REGISTRY.build("head", {"name": "group_sum", "tau": 0.5}, input_size=6, num_classes=3)
    assert isinstance(head, GroupSum)
    x = torch.tensor([[1.0, 1, 0, 1, 0, 0], [0, 0, 1, 1, 1, 0]])
    wanted = torch.tensor([[4.0, 2, 0], [0, 4, 2]])
    assert torch.equal(head(x), wanted)
    assert torch.equal(head(x.t().contiguous().t()), wanted)
    assert torch.equal(head(x.bool()), wanted)
    assert head(x[:0]).shape == (0, 3)
    assert head(x.double()).dtype == torch.float64


def test_gradient() -> None:
    head = GroupSum(6, 2, tau=4.0)
    x = torch.rand(5, 6, requires_grad=True)
    upstream = torch.randn(5, 2)
    head(x).backward(upstream)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, upstream.repeat_interleave(3, dim=1) / 4)


def test_counts_are_exact_in_low_precision() -> None:
    head = GroupSum(2002, 2)
    x = torch.ones(3, 2002, dtype=torch.bfloat16)
    assert torch.equal(head(x), torch.full((3, 2), 1001.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(x.float()), torch.full((3, 2), 1001.0))


def test_errors() -> None:
    with pytest.raises(ConfigError, match="input_size=7 must be a multiple of the 3 classes"):
        GroupSum(7, 3)
    with pytest.raises(ValueError, match=r"shape \(batch, 6\), got \(2, 7\)"):
        GroupSum(6, 3)(torch.rand(2, 7))
    with pytest.raises(ConfigError, match=r"^head\.tau=0: must be greater than 0"):
        schema.validate_part("head", {"name": "group_sum", "tau": 0}, "head")


def test_learnable_temperature() -> None:
    head = GroupSum(6, 2, tau=4.0, learnable_tau=True)
    fixed = GroupSum(6, 2, tau=4.0)
    x = torch.rand(8, 6)
    torch.testing.assert_close(head(x), fixed(x))
    assert [name for name, _ in head.named_parameters()] == ["log_tau"] and not list(fixed.parameters())
    # the derivative of a score in log tau is minus the score
    upstream = torch.randn(8, 2)
    head(x).backward(upstream)
    assert head.log_tau.grad is not None
    torch.testing.assert_close(head.log_tau.grad, -(upstream * fixed(x)).sum())
    # bits that agree with the classes want a small temperature
    bits = torch.eye(2).repeat_interleave(3, dim=1)
    optimizer = torch.optim.SGD(head.parameters(), lr=10.0)
    for _ in range(50):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(bits), torch.tensor([0, 1])).backward()
        optimizer.step()
    assert 0 < head.log_tau.exp() < 1
    other = GroupSum(6, 2, learnable_tau=True)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(x), head(x))
    assert "tau=4.0" in repr(fixed) and "(learnable)" in repr(head)


def test_a_temperature_that_is_trained_has_no_schedule() -> None:
    assert GroupSum(6, 2).SCHEDULABLE == ("tau",)
    assert GroupSum(6, 2, learnable_tau=True).SCHEDULABLE == ()
    head = GroupSum(6, 2)
    before = head(torch.ones(1, 6))
    head.tau = 2.0
    assert torch.equal(head(torch.ones(1, 6)), before / 2)
