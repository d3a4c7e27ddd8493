"""The base class of LUT layers, and what a layer of one's own may build on.

Shape letters: B batch, F inputs of the layer, N nodes, n inputs per node (fan-in).
"""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from difflut_lab import schema
from difflut_lab.errors import ConfigError
from difflut_lab.layers.layer_config import LayerConfig
from difflut_lab.layers.stabilization import stabilize
from difflut_lab.layers.wiring_cache import WiringCache
from difflut_lab.nodes import LUTNodes
from difflut_lab.ops import Flips, Wiring, flip_mask
from difflut_lab.registry import REGISTRY
from difflut_lab.seeding import derive_seed

# classes whose forward was found not to flip, told once each
_never_flipped: weakref.WeakSet[type] = weakref.WeakSet()


class BaseLUTLayer(nn.Module):
    """A layer of LUT nodes: bits of the layer below, or values in [0, 1], to bits.

    A subclass supplies ``wiring()``, or overrides ``route(x)``, or overrides ``forward`` whole. Such a forward calls
    ``self._apply_bit_flip(routed)`` where inputs are to be flipped and ends in
    ``self._apply_gradient_stabilization(y)``; where it forgets the second, it is done for it.

    Parameters
    ----------
    input_size : int
        F, the inputs of the layer.
    output_size : int
        N, its nodes and outputs.
    node_type : str or type
        Registered name of the nodes, or a subclass of ``LUTNodes``.
    n : int
        Inputs per node.
    node_kwargs : mapping, optional
        Options of the nodes.
    layer_config : LayerConfig or mapping, optional
        Augmentation while training.
    seed : int
        Seed of wiring, initial values and flips, each drawn from a stream of its own; the global random state is
        neither read nor changed.

    Attributes
    ----------
    nodes : LUTNodes
        The bank of nodes.
    layer_config : LayerConfig
        May be replaced at any time.
    layer_index : int
        Place in a stack of layers: layers with the same seed and different places flip different inputs.
    flip_step : Tensor
        Number of training forwards so far, int64, a buffer.
    frozen_wiring : Tensor or None
        The wiring, int32 ``(N, n)``, a buffer once the layer is frozen.
    """

    flip_step: Tensor
    frozen_wiring: Tensor | None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        node_type: str | type[LUTNodes] = "probabilistic",
        n: int = 6,
        node_kwargs: Mapping[str, Any] | None = None,
        layer_config: LayerConfig | Mapping[str, Any] | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("output_size", output_size)):
            if size < 1:
                raise ConfigError(f"{name}={size}: must be at least 1.")
        self.input_size = input_size
        self.output_size = output_size
        self.n = n
        self.seed = seed
        self.layer_index = 0
        self.layer_config = layer_config
        nodes = REGISTRY.get("node", node_type) if isinstance(node_type, str) else node_type
        self.nodes: LUTNodes = nodes(output_size, n, seed=derive_seed(seed, "init"), **(node_kwargs or {}))
        self.register_buffer("flip_step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("frozen_wiring", None)
        self._flip_seed = derive_seed(seed, "flips")
        self._wiring_cache = WiringCache()
        self._flipped = False
        self._stabilized = False
        if type(self).forward is not BaseLUTLayer.forward:
            self.register_forward_hook(_complete_forward)

    @property
    def layer_config(self) -> LayerConfig:
        """Augmentation while training."""
        return self._layer_config

    @layer_config.setter
    def layer_config(self, config: LayerConfig | Mapping[str, Any] | None) -> None:
        if not isinstance(config, LayerConfig | Mapping | None):
            raise ConfigError(f"layer_config={config!r}: must be a LayerConfig or a mapping of its fields.")
        if not isinstance(config, LayerConfig):
            config = LayerConfig(**schema.validate(LayerConfig, config or {}, "layer_config"))
        self._layer_config = config

    def wiring(self) -> Tensor:
        """Which inputs each node reads: int32 ``(N, n)``, -1 for a constant 0.

        Best a buffer, which follows ``.to(device)`` and is in the state_dict. For ``torch.compile(fullgraph=True)`` it
        must be one, and ``__init__`` must end in ``self._refresh()``.
        """
        raise NotImplementedError(f"{type(self).__name__} must supply wiring() or override route(x)")

    @property
    def fixed_wiring(self) -> bool:
        """Whether ``wiring()`` alone says how a forward in the present mode routes."""
        cls = type(self)
        return self.is_frozen or (cls.wiring is not BaseLUTLayer.wiring and cls.route is BaseLUTLayer.route)

    @torch.no_grad()
    def reads(self) -> Tensor | None:
        """How often the nodes read each input, int64 ``(F,)``; None where there is no ``wiring()`` that says so."""
        if type(self).wiring is BaseLUTLayer.wiring:
            return None
        indices = self._wiring().indices.flatten()
        return torch.bincount(indices[indices >= 0], minlength=self.input_size)

    def route(self, x: Tensor) -> Tensor:
        """Routed inputs ``(B, N, n)`` of inputs ``(B, F)``; by default those that the wiring names."""
        wiring = self._wiring()
        # indexing, not index_select: its backward sums in a fixed order
        routed = x[:, wiring.indices.clamp(min=0).long()]
        if wiring.padded:
            routed = routed.masked_fill(wiring.indices < 0, 0)
        return routed

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(B, N)`` of inputs ``(B, F)``.

        Raises
        ------
        ValueError
            If the shape of x is another.
        """
        self._check_shape(x)
        if not self.nodes.can_fuse:
            y = self.nodes(self._apply_bit_flip(self.route(x)))
        elif self.fixed_wiring:
            y = self.nodes.fused(x, self._wiring(), self._flips(x.shape[0]))
        else:
            y = self.nodes.fused(self.route(x).flatten(1), None, self._flips(x.shape[0]))
        return self._apply_gradient_stabilization(y)

    def freeze(self) -> None:
        """Store truth table and wiring as buffers and use them from now on, in every mode, without augmentation.

        A layer that routes without ``wiring()`` keeps its own routing. The state_dict of a frozen layer fits a layer
        that was frozen too: build it, ``freeze()`` it, then load.
        """
        if type(self).wiring is not BaseLUTLayer.wiring:
            self.frozen_wiring = self._wiring().indices.detach().clone()
        self.nodes.freeze()
        self.requires_grad_(False)

    @property
    def is_frozen(self) -> bool:
        """Whether the layer is its stored truth table and wiring, in every mode."""
        return self.nodes.is_frozen

    def extra_repr(self) -> str:
        return f"input_size={self.input_size}, output_size={self.output_size}, n={self.n}, {self.layer_config}"

    def _apply_bit_flip(self, routed: Tensor) -> Tensor:
        """Flip routed copies of inputs with the configured probability, in training mode; gradients pass unchanged.

        Each call counts one step, so that two calls in one forward flip different inputs.

        Parameters
        ----------
        routed : Tensor
            ``(B, N, n)``, or any shape that begins with B, such as the ``(B, n)`` of one node.

        Returns
        -------
        Tensor
            The same shape; flipped copies are 1 - x.
        """
        flips = self._flips(routed.shape[0])
        if flips is None:
            return routed
        batch, *rows, columns = routed.shape
        mask = flip_mask(flips, math.prod(rows), columns, batch)
        if type(self).wiring is not BaseLUTLayer.wiring and (*rows, columns) == (self.output_size, self.n):
            # a constant 0 is wired to nothing that could flip
            mask = mask & (self._wiring().indices >= 0).unsqueeze(2)
        flipped: Tensor = _Flip.apply(routed, mask.permute(2, 0, 1).reshape(routed.shape))
        return flipped

    def _apply_gradient_stabilization(self, y: Tensor) -> Tensor:
        """The identity on outputs ``(B, N)``, whose gradient is standardised as configured, in training mode."""
        self._stabilized = True
        return stabilize(y, self.layer_config) if self.training else y

    def _check_shape(self, x: Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != self.input_size:
            raise ValueError(
                f"{type(self).__name__} expects inputs of shape (batch, {self.input_size}), got {tuple(x.shape)}."
            )

    def _flips(self, batch: int) -> Flips | None:
        """The flips of this forward, None where nothing is flipped; counts the step."""
        self._flipped = True
        if not self.training:
            return None
        flips = None
        if self.layer_config.flip_probability > 0 and not self.is_frozen:
            flips = Flips(
                probability=self.layer_config.flip_probability,
                seed=self._flip_seed,
                # a forward's backward runs after later forwards may have counted on
                step=self.flip_step.clone(),
                layer=self.layer_index,
                sample_offset=_rank() * batch,
            )
        self.flip_step += 1
        return flips

    def _wiring(self) -> Wiring:
        """The wiring as ops take it."""
        indices = self.wiring() if self.frozen_wiring is None else self.frozen_wiring
        if tuple(indices.shape) != (self.output_size, self.n):
            raise ValueError(
                f"{type(self).__name__}.wiring() must have shape ({self.output_size}, {self.n}), "
                f"got {tuple(indices.shape)}."
            )
        return self._wiring_cache.get(indices, self.input_size)

    def _refresh(self) -> None:
        """Derive anew what is kept of the wiring, ahead of code that is compiled and cannot."""
        if self.fixed_wiring and not self.flip_step.is_meta:
            self._wiring()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # memory from to_empty holds no wiring until one is loaded
        with contextlib.suppress(ValueError):
            self._refresh()
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        try:
            self._refresh()
        except ValueError as error:
            error_msgs.append(f"While loading the wiring of {prefix.rstrip('.') or type(self).__name__}: {error}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._refresh()


class _Flip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, routed: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, ~routed if routed.dtype == torch.bool else 1 - routed, routed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _complete_forward(layer: BaseLUTLayer, inputs: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of classes with a forward of their own: does what that forward left out, or says so."""
    del inputs
    flipped, is_stabilized = layer._flipped, layer._stabilized
    layer._flipped = layer._stabilized = False
    if not layer.training or layer.is_frozen:
        return None
    if layer.layer_config.flip_probability > 0 and not flipped and type(layer) not in _never_flipped:
        _never_flipped.add(type(layer))
        warnings.warn(
            f"{type(layer).__name__} overrides forward and never calls self._apply_bit_flip(routed): "
            f"flip_probability={layer.layer_config.flip_probability} has no effect in it.",
            stacklevel=2,
        )
    if not is_stabilized and isinstance(output, Tensor):
        return stabilize(output, layer.layer_config)
    return None


def _rank() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0
