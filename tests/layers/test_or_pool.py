from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from difflut_lab.errors import ConfigError
from difflut_lab.layers import OrPool, Shortcut

CASES = [((3, 8, 8), 2, None), ((2, 7, 5), 2, None), ((2, 7, 6), 3, 2), ((1, 4, 4), 4, None), ((2, 5, 5), 1, 2)]


@pytest.mark.parametrize(("shape", "window", "stride"), CASES)
def test_the_greatest_of_each_window(shape, window, stride):
    pool = OrPool(shape, window, stride)
    x = torch.rand(4, shape[0] * shape[1] * shape[2], dtype=torch.float64, requires_grad=True)
    wanted = F.max_pool2d(x.view(4, *shape), window, stride)
    assert pool.output_shape == tuple(wanted.shape[1:])
    y = pool(x)
    assert torch.equal(y, wanted.flatten(1)) and y.t().is_contiguous()
    upstream = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, x, upstream)[0] for out in (y, wanted.flatten(1)))
    torch.testing.assert_close(ours, theirs)


def test_bits_are_ored_and_share_the_gradient():
    pool = OrPool((1, 2, 4), 2)
    x = torch.tensor([[1.0, 0, 0, 0, 1, 0, 0, 0]], requires_grad=True)
    y = pool(x)
    assert y.tolist() == [[1, 0]]
    y.backward(torch.tensor([[1.0, 2.0]]))
    assert x.grad is not None and x.grad.tolist() == [[0.5, 0, 0.5, 0.5, 0.5, 0, 0.5, 0.5]]
    assert pool(x.detach().bool()).tolist() == [[True, False]]
    assert pool(x[:0]).shape == (0, 2)


def test_errors():
    with pytest.raises(ConfigError, match="or_pool: a window of 3 x 3 does not fit into a plane of 2 x 4"):
        OrPool((1, 2, 4), 3)
    with pytest.raises(ConfigError, match="or_pool: window=0: must be at least 1"):
        OrPool((1, 2, 4), 0)
    with pytest.raises(ValueError, match=r"expects inputs of shape \(batch, 8\), got \(3, 9\)"):
        OrPool((1, 2, 4), 2)(torch.rand(3, 9))


def test_a_shortcut_appends_the_inputs_as_channels():
    x = torch.rand(3, 8).t().contiguous().t()
    y = Shortcut(nn.Linear(8, 4))(x)
    assert y.shape == (3, 12) and torch.equal(y[:, 4:], x) and y.t().is_contiguous()
