"""Whole networks with the Triton kernels: training steps equal the reference's, and compile as one graph.

On a machine with a GPU, TRITON_INTERPRET=0 runs the same tests on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("triton")

from difflut_lab.models import LUTMLP
from difflut_lab.ops import chosen_kernels, use_kernels

INTERPRETED = os.environ["TRITON_INTERPRET"] != "0"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
OPS = {"probabilistic": "interpolate", "dwn": "lookup"}
LAYERS: list[dict[str, Any]] = [
    {"name": "random_routing"},
    {"name": "learnable_routing"},
    {"name": "learnable_routing", "candidates": 5},
    # groups shorter than n: padded wiring
    {"name": "feature_wise_groups", "num_groups": 6},
]

pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    use_kernels("auto")


def network(layer: dict[str, Any], node: str) -> nn.Module:
    model = LUTMLP(
        widths=[12, 9],
        input_shape=(8,),
        num_classes=3,
        encoder={"name": "thermometer", "bits": 2},
        layer=layer,
        node={"name": node, "n": 4},
        head={"name": "group_sum"},
        layer_config={"flip_probability": 0.2, "grad_stabilization": "layerwise"},
    )
    model.calibrate(torch.linspace(-1, 1, 80).view(10, 8))
    return model.to(DEVICE)


def train(model: nn.Module, run: Any, kernels: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of some steps, the last with a smaller batch, and the weights after them."""
    use_kernels(kernels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for batch in (20, 20, 13):
        x = torch.randn(batch, 8, generator=generator).to(DEVICE)
        labels = torch.randint(3, (batch,), generator=generator).to(DEVICE)
        loss = functional.cross_entropy(run(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def assert_same(got: tuple[list[float], dict[str, Tensor]], want: tuple[list[float], dict[str, Tensor]]) -> None:
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    for name, tensor in want[1].items():
        torch.testing.assert_close(got[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("node", list(OPS))
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: "-".join(map(str, layer.values())))
def test_training_steps_equal_the_references(layer: dict[str, Any], node: str) -> None:
    models = [network(layer, node) for _ in range(2)]
    want = train(models[0], models[0], "reference")
    got = train(models[1], models[1], "triton")
    assert chosen_kernels()[OPS[node]] == "triton"
    assert_same(got, want)
    before = network(layer, node).state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in got[1].items() if name.endswith("weight"))


@pytest.mark.parametrize("node", list(OPS))
@pytest.mark.parametrize("layer", LAYERS[:2], ids=lambda layer: layer["name"])
def test_a_network_compiles_as_one_graph(layer: dict[str, Any], node: str) -> None:
    models = [network(layer, node) for _ in range(2)]
    want = train(models[0], models[0], "triton")
    backend = "aot_eager" if INTERPRETED else "inductor"
    assert_same(train(models[1], torch.compile(models[1], fullgraph=True, backend=backend), "triton"), want)
