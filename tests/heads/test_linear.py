from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from difflut_lab import REGISTRY, schema
from difflut_lab.errors import ConfigError
from difflut_lab.heads import Linear, build_head
from difflut_lab.models import LUTMLP
from difflut_lab.registry import Registry


def test_scores_are_weighted_sums() -> None:
    head = build_head({"name": "linear", "tau": 2.0}, 6, 3, seed=1)
    assert isinstance(head, Linear)
    x = (torch.rand(5, 6) > 0.5).float()
    weight, bias = head.weight.tolist(), head.bias.tolist()
    wanted = torch.tensor(
        [[(sum(weight[c][i] for i in range(6) if x[b, i]) + bias[c]) / 2 for c in range(3)] for b in range(5)]
    )
    torch.testing.assert_close(head(x), wanted)
    for same in (x.t().contiguous().t(), x.bool(), x.bfloat16(), x.double()):
        torch.testing.assert_close(head(same), wanted)
    assert head(x[:0]).shape == (0, 3)


def test_initial_values_derive_from_the_seed() -> None:
    before = torch.get_rng_state()
    head = Linear(100, 20, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(head.weight, Linear(100, 20, seed=3).weight)
    assert not torch.equal(head.weight, Linear(100, 20, seed=4).weight)
    for parameter in head.parameters():
        assert 0.08 < parameter.abs().max() <= 0.1
    assert head.weight.mean().abs() < 0.01


def test_networks_of_different_seeds_have_different_heads() -> None:
    def build(seed: int) -> LUTMLP:
        return LUTMLP(
            widths=[8, 7],
            input_shape=(4,),
            num_classes=2,
            encoder={"name": "thermometer"},
            layer={"name": "random_routing"},
            node={"name": "dwn", "n": 2},
            head={"name": "linear"},
            seed=seed,
        )

    before = torch.get_rng_state()
    first = build(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.head.weight, build(1).head.weight)
    assert not torch.equal(first.head.weight, build(2).head.weight)


def test_a_head_that_asks_for_no_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    class First(nn.Module):
        def __init__(self, input_size: int, num_classes: int, *, scale: float = 1.0) -> None:
            super().__init__()
            self.num_classes, self.scale = num_classes, scale

        def forward(self, x: Tensor) -> Tensor:
            return x[:, : self.num_classes] * self.scale

    monkeypatch.setattr(Registry, "get", lambda self, kind, name, **_: First)
    head = build_head({"name": "first", "scale": 2.0}, 6, 3, seed=1)
    assert isinstance(head, First) and head.scale == 2


def test_learns() -> None:
    x = (torch.rand(300, 8) > 0.5).float()
    y = (x @ torch.tensor([1.0, -1, 2, 0, 0, 1, -2, 0.5]) > 0.5).long()
    head = Linear(8, 2)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x), y).backward()
        optimizer.step()
    assert (head(x).argmax(dim=1) == y).float().mean() > 0.95


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"shape \(batch, 6\), got \(2, 7\)"):
        Linear(6, 3)(torch.rand(2, 7))
    with pytest.raises(ConfigError, match="linear: num_classes=0: must be at least 1"):
        Linear(6, 0)
    with pytest.raises(ConfigError, match=r"^head\.tau=-1.0: must be greater than 0"):
        Linear(6, 3, tau=-1.0)
    with pytest.raises(ConfigError, match=r"^head\.tau=0: must be greater than 0"):
        schema.validate_part("head", {"name": "linear", "tau": 0}, "head")
    with pytest.raises(ConfigError, match=r"Unknown key 'head\.seed'"):
        schema.validate_part("head", {"name": "linear", "seed": 3}, "head")
    assert "linear" in REGISTRY.names("head")
