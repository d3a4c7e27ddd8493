from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from difflut_lab import REGISTRY
from difflut_lab.layers import LayerConfig

PARTS = [
    ("random_routing", "dwn"),
    ("learnable_routing", "dwn"),
    ("feature_wise_groups", "probabilistic"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("layer", "node"), PARTS)
def test_a_stack_compiles_whole_and_trains_the_same(layer: str, node: str) -> None:
    config = LayerConfig(flip_probability=0.2, grad_stabilization="batch")
    model = nn.Sequential(
        REGISTRY.get_layer(layer)(24, 16, node, 3, layer_config=config),
        REGISTRY.get_layer(layer)(16, 12, node, 3, layer_config=config, seed=7),
    )
    twin = copy.deepcopy(model)
    compiled: nn.Module = torch.compile(twin, fullgraph=True, backend="aot_eager")  # type: ignore[assignment]  # an OptimizedModule
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (model, twin)]
    # the last, smaller batch of an epoch compiles for batches of any size
    for batch in (10, 7, 9):
        x = torch.rand(batch, 24, requires_grad=True)
        losses = []
        for run, optimizer in zip((model, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            loss = (run(x) - 0.3).square().sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0])
    for wanted, got in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(got, wanted)
    x = torch.randint(0, 2, (30, 24)).float()
    model.eval()
    twin.eval()
    assert torch.equal(compiled(x), model(x))
