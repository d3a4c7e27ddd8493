"""Convolutions whose kernels are trees of lookup tables.

Shape letters: B batch, C channels, H and W height and width, P positions of a kernel, T trees, d levels of a tree,
R places in the receptive field of all channels, N nodes of one level, n inputs per node.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from difflut_lab import schema
from difflut_lab.errors import ConfigError
from difflut_lab.layers.base import BaseLUTLayer
from difflut_lab.layers.layer_config import LayerConfig
from difflut_lab.layers.random_routing import balanced_wiring
from difflut_lab.layers.windows import Windows
from difflut_lab.nodes import LUTNodes
from difflut_lab.ops import Flips, Wiring, flip_mask
from difflut_lab.registry import REGISTRY, register_layer
from difflut_lab.schema import PositiveInt
from difflut_lab.seeding import derive_seed, generator

Padding = Annotated[int, Field(ge=0)]
TreeDepth = Annotated[int, Field(ge=1, le=8)]


@register_layer("conv_lut")
class ConvLUT(BaseLUTLayer):
    """Every output channel is a tree of LUT nodes that slides over the planes (Petersen et al., arXiv 2411.04732).

    The first level of a tree has n^(d-1) nodes; each reads n distinct places (channel, dy, dx) of the receptive field,
    drawn at random and fixed. The nodes of every further level join n outputs of the level before. All positions share
    the tables: to a bank, a pair of position and sample is one entry of its batch. In a group every place is read
    before any is read twice, but for places that see nothing except padding: those are not read.

    Planes come and go flattened, as features ``(B, C * H * W)`` in the order of ``torch.flatten``, stored
    feature-major: blocks of convolutions, pooling and other layers follow each other without a copy.

    Each level behaves as a layer does: the routed inputs of its nodes may flip, but not the zeros of the padding, and
    the gradient of its outputs is stabilised, ``nodewise`` over samples and positions, ``batch`` over nodes and
    positions.

    What the R places see is formed once per forward for all trees, ``(R, P * B)``: k^2 times the input's memory at
    stride 1, bits in a byte each in eval mode. It is not kept: a backward that needs it forms it anew. Measured with 16
    planes of 14 x 14, 64 trees, d = 2, n = 6, B = 128: forming it takes 5 to 8 % of a step, and at most 14 of 90 MB at
    the peak. Nodes that read padded planes in place were no faster: they compute the columns of the padding, too.

    Parameters
    ----------
    input_size : int
        C * H * W.
    output_size : int
        T, trees and output channels.
    node_type, n, node_kwargs, layer_config, seed
        As of ``BaseLUTLayer``.
    input_shape : tuple of int, optional
        (C, H, W). None stands for planes of one pixel, ``input_size`` of them.
    kernel_size, stride, padding : int
        Side of the kernel, step from one position to the next, and zeros around the planes.
    groups : int
        Cuts of the channels: trees of a group read channels of that group only. Divides C and T.
    tree_depth : int
        d.

    Attributes
    ----------
    nodes : LUTNodes
        The bank of the trees' roots, T nodes.
    branches : nn.ModuleList
        The banks of the levels before, the first level first; empty for d = 1.
    indices : Tensor
        The wiring of the first level, int32 ``(T * n^(d-1), n)``: place ``c * len(taps) + tap`` is channel c seen by
        ``windows.taps[tap]``. Nodes of a tree follow each other. A buffer.
    windows : Windows
        The positions of the kernel.
    output_shape : tuple of int
        (T, height, width).

    Raises
    ------
    ConfigError
        If the kernel does not fit the planes, the groups do not divide the channels, or a node reads more inputs than
        the receptive field has.
    """

    indices: Tensor

    def __init__(
        self,
        input_size: int,
        output_size: int,
        node_type: str | type[LUTNodes] = "probabilistic",
        n: int = 6,
        node_kwargs: Mapping[str, Any] | None = None,
        layer_config: LayerConfig | Mapping[str, Any] | None = None,
        seed: int = 42,
        *,
        input_shape: tuple[int, int, int] | None = None,
        kernel_size: PositiveInt = 3,
        stride: PositiveInt = 1,
        padding: Padding = 1,
        groups: PositiveInt = 1,
        tree_depth: TreeDepth = 1,
    ) -> None:
        super().__init__(input_size, output_size, node_type, n, node_kwargs, layer_config, seed)
        options = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "groups": groups}
        schema.validate(ConvLUT, options | {"tree_depth": tree_depth}, "layer", REGISTRY.provided("layer"))
        self.input_shape = input_shape or (input_size, 1, 1)
        if math.prod(self.input_shape) != input_size:
            raise ConfigError(f"conv_lut: input_shape={self.input_shape} does not have input_size={input_size} values.")
        channels, height, width = self.input_shape
        try:
            self.windows = Windows(height=height, width=width, size=kernel_size, stride=stride, padding=padding)
        except ConfigError as error:
            raise ConfigError(f"conv_lut: kernel_size={kernel_size}: {error}") from None
        if channels % groups or output_size % groups:
            raise ConfigError(
                f"conv_lut: groups={groups} must divide the {channels} input and {output_size} output channels."
            )
        self.groups = groups
        self.output_shape = (output_size, self.windows.rows, self.windows.columns)
        sizes = [output_size * n**level for level in range(tree_depth - 1, 0, -1)]
        self.branches = nn.ModuleList(
            type(self.nodes)(size, n, seed=derive_seed(seed, "init", level), **node_kwargs or {})
            for level, size in enumerate(sizes)
        )
        drawn = field_wiring(channels, self.windows, groups, self._banks()[0].num_nodes, n, generator(seed, "wiring"))
        self.register_buffer("indices", drawn)
        self._refresh()

    def wiring(self) -> Tensor:
        return self.indices

    @property
    def fixed_wiring(self) -> bool:
        return True

    def route(self, x: Tensor) -> Tensor:
        """Routed inputs of the first level, ``(P * B, N, n)``, of inputs ``(B, C * H * W)``."""
        return _routed(self._seen(x), self._wiring(), self.n)

    @torch.no_grad()
    def reads(self) -> Tensor:
        """How often each input is read over all positions, int64 ``(C * H * W,)``."""
        windows, places = self.windows, self.input_shape[0] * len(self.windows.taps)
        counts = torch.bincount(self._wiring().indices.flatten(), minlength=places)
        seen = counts.view(-1, len(windows.taps), 1, 1, 1).expand(-1, -1, windows.rows, windows.columns, -1)
        return windows.fold(seen).flatten()

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(B, T * height * width)`` of inputs ``(B, C * H * W)``.

        Raises
        ------
        ValueError
            If the shape of x is another.
        """
        self._check_shape(x)
        dtype, batch = x.dtype, x.shape[0]
        flips = self._flips(batch * self.windows.positions)
        if not self.nodes.is_relaxed and x.is_floating_point():
            x = x >= 0.5
        if flips is not None and not x.is_floating_point():
            x = x.to(torch.get_default_dtype())
        # a constant 0 that does not flip
        fill = 0.0 if flips is None else -torch.inf
        y, wiring = self._seen(x, fill), self._wiring()
        for level, bank in enumerate(self._banks()):
            if flips is not None and level > 0:
                flips = replace(flips, seed=derive_seed(self._flip_seed, level))
            with self._form_anew(y, x, fill) if level == 0 else nullcontext():
                y = self._stabilized_level(_evaluate(bank, y, wiring if level == 0 else None, flips), batch)
        return self._planes(y, batch).to(dtype if dtype.is_floating_point else y.dtype)

    def freeze(self) -> None:
        super().freeze()
        for bank in self._banks()[:-1]:
            bank.freeze()

    def extra_repr(self) -> str:
        windows = self.windows
        return (
            f"{super().extra_repr()}, input_shape={self.input_shape}, output_shape={self.output_shape}, "
            f"kernel_size={windows.size}, stride={windows.stride}, padding={windows.padding}, groups={self.groups}, "
            f"tree_depth={len(self.branches) + 1}"
        )

    def _banks(self) -> list[LUTNodes]:
        """The banks of all levels, the first level first."""
        return [*self.branches, self.nodes]

    def _wiring(self) -> Wiring:
        indices = self.wiring() if self.frozen_wiring is None else self.frozen_wiring
        return self._wiring_cache.get(indices, self.input_shape[0] * len(self.windows.taps))

    def _seen(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """What the places of the receptive field see, ``(P * B, R)``, feature-major; ``fill`` in the padding."""
        seen: Tensor = _Unfold.apply(x, self.input_shape, self.windows, fill)
        return seen

    def _form_anew(self, seen: Tensor, x: Tensor, fill: float) -> AbstractContextManager[Any]:
        """What is computed in this context keeps x for its backward where it would have kept ``seen``."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not self.nodes.is_relaxed:
            return nullcontext()
        place, shape, x = seen.data_ptr(), seen.shape, x.detach()

        def pack(tensor: Tensor) -> Tensor | None:
            return None if tensor.data_ptr() == place and tensor.shape == shape else tensor

        def unpack(kept: Tensor | None) -> Tensor:
            return self._seen(x, fill) if kept is None else kept

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _stabilized_level(self, y: Tensor, batch: int) -> Tensor:
        """One level's outputs ``(P * B, N)``, their gradient stabilised."""
        if self.layer_config.grad_stabilization != "batch":
            return self._apply_gradient_stabilization(y)
        # a sample's outputs side by side
        planes = self._apply_gradient_stabilization(self._planes(y, batch))
        return planes.t().reshape(y.t().shape).t()

    def _planes(self, y: Tensor, batch: int) -> Tensor:
        """``(P * B, N)`` as ``(B, N * P)``, both feature-major: the same memory."""
        return y.t().reshape(y.shape[1] * self.windows.positions, batch).t()


class _Unfold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int, int], windows: Windows, fill: float) -> Tensor:
        ctx.shape, ctx.windows = shape, windows
        planes = x.t().contiguous().view(*shape, len(x))
        return windows.unfold(planes, fill).view(shape[0] * len(windows.taps), windows.positions * len(x)).t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        windows = ctx.windows
        shape = (ctx.shape[0], len(windows.taps), windows.rows, windows.columns, len(gradient) // windows.positions)
        seen = gradient.t().contiguous().view(shape)
        return windows.fold(seen).flatten(0, 2).t(), None, None, None


def _routed(y: Tensor, wiring: Wiring | None, n: int) -> Tensor:
    """What each node reads, ``(P * B, N, n)``."""
    return (y if wiring is None else y[:, wiring.indices.flatten().long()]).unflatten(1, (-1, n))


def _evaluate(bank: LUTNodes, y: Tensor, wiring: Wiring | None, flips: Flips | None) -> Tensor:
    """Outputs ``(P * B, N)`` of one level; without a wiring, nodes read what lies side by side in y."""
    if bank.can_fuse:
        return bank.fused(y, wiring, flips)
    routed = _routed(y, wiring, bank.n)
    if flips is not None:
        mask = flip_mask(flips, bank.num_nodes, bank.n, len(y)).permute(2, 0, 1)
        padding = routed == -torch.inf
        routed = routed.masked_fill(padding, 0)
        # the gradient passes unchanged
        routed = routed + (mask & ~padding) * (1 - 2 * routed).detach()
    output: Tensor = bank(routed)
    return output


def field_wiring(channels: int, windows: Windows, groups: int, num_nodes: int, n: int, generator: Generator) -> Tensor:
    """Draw which places of the receptive field each node of a first level reads.

    Parameters
    ----------
    channels : int
        C.
    windows : Windows
        The kernel's positions.
    groups, num_nodes, n : int
        Groups of channels, nodes of all groups together, inputs per node.
    generator : Generator
        Source of randomness.

    Returns
    -------
    Tensor
        int32 ``(num_nodes, n)``, places ``c * taps + tap``; no node reads a place twice.

    Raises
    ------
    ConfigError
        If n is greater than the places there are.
    """
    share, taps = channels // groups, len(windows.taps)
    if n > share * taps:
        raise ConfigError(
            f"conv_lut: each node reads n={n} distinct inputs, but its receptive field has only {share * taps} "
            f"({share} channels of {taps})."
        )
    drawn = [balanced_wiring(share * taps, num_nodes // groups, n, generator) for _ in range(groups)]
    return torch.cat([places + group * share * taps for group, places in enumerate(drawn)])
