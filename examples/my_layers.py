"""Two layers of one's own, in a file of one's own.

python train.py plugins=[examples.my_layers] layer=my_layer layer.span=32
python train.py plugins=[my_layers] layer=my_custom_layer layer.foo=5      (from the folder of this file)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflut_lab import register_layer
from difflut_lab.layers import BaseLUTLayer
from difflut_lab.schema import PositiveInt
from difflut_lab.seeding import generator


@register_layer("my_layer")
class MyLayer(BaseLUTLayer):
    """Every node reads inputs from one window of neighbours; the windows lie evenly over the inputs."""

    idx: Tensor

    def __init__(self, *args: Any, span: PositiveInt = 16, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        span = min(span, self.input_size)
        starts = torch.linspace(0, self.input_size - span, self.output_size).round().int()
        offsets = torch.randint(span, (self.output_size, self.n), generator=generator(self.seed, "wiring"))
        self.register_buffer("idx", starts[:, None] + offsets.int())

    def wiring(self) -> Tensor:
        """int32 (nodes, n)"""
        return self.idx


@register_layer("my_custom_layer")
class MyCustomLayer(BaseLUTLayer):
    """A forward written node by node: slow, but nothing in it is fixed. Node j reads every foo-th input from j on."""

    idx: Tensor

    def __init__(self, *args: Any, foo: int = 5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        nodes, slots = torch.arange(self.output_size)[:, None], torch.arange(self.n)
        self.register_buffer("idx", (nodes + foo * slots) % self.input_size)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, input_size) to (batch, output_size)"""
        routed = self._apply_bit_flip(x[:, self.idx])
        output = torch.cat([self.nodes[j](routed[:, j]) for j in range(self.output_size)], dim=1)
        return self._apply_gradient_stabilization(output)
