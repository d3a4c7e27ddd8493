"""Banks of LUT nodes: what every kind of node has in common.

Shape letters: B batch, N nodes, n inputs per node (fan-in), K = 2^n table entries, F inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from difflut_lab.errors import ConfigError
from difflut_lab.nodes.regularizers import Regularizer
from difflut_lab.ops import Flips, Wiring, lookup
from difflut_lab.registry import REGISTRY
from difflut_lab.schema import PartOf
from difflut_lab.seeding import generator

MAX_FAN_IN = 12

# addresses tabulated at once; bounds the memory that enumeration takes
_CHUNK = 256


def _check_fan_in(n: int) -> int:
    if n < 1:
        raise ValueError(f"must be at least 1 and at most {MAX_FAN_IN}")
    if n > MAX_FAN_IN:
        raise ValueError(f"must be at most {MAX_FAN_IN}; {_cost(n)}")
    return n


def _cost(n: int) -> str:
    if n > 60:
        return f"that is 2^{n} entries per node"
    table = 4 * 2**n
    return f"that is {2**n:,} entries per node, {_size(table)} of float32 each, {_size(1000 * table)} for 1,000 nodes"


def _size(count: float) -> str:
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = 0
    while count >= 1024 and power < len(units) - 1:
        count, power = count / 1024, power + 1
    return f"{count:,.1f} {units[power]}".replace(".0 ", " ")


def _name(part: str | Mapping[str, Any]) -> str:
    return part if isinstance(part, str) else part["name"]


FanIn = Annotated[int, AfterValidator(_check_fan_in)]


class LUTNodes(nn.Module):
    """A bank of N nodes with n inputs each; the base class of all kinds of node.

    Every parameter leads with N. A kind of node supplies ``relaxed`` and, where the sign of a rounded result would be
    unsure, ``tabulate``. Nodes with a table of their own build on ``TableNodes`` instead.

    Parameters
    ----------
    num_nodes : int
        N, the number of nodes.
    n : int
        Inputs per node, 1 to 12.
    regularizer : str or mapping, optional
        Registered penalty on what ``regularized`` gives: its name, or a mapping of ``name`` and options.
    seed : int
        Seed of everything random in the bank.

    Attributes
    ----------
    SCHEDULABLE : tuple of str
        Names of the plain float attributes that may change during training; each forward reads them afresh.
    soft : bool
        Evaluate the relaxation in eval mode too; set by ``difflut_lab.layers.soft``.
    frozen_table : Tensor or None
        The truth table, bool ``(N, K)``, a buffer once the bank is frozen.

    Raises
    ------
    ConfigError
        If n is out of range; says what a larger one would cost. If the regulariser needs a table and there is none.
    """

    SCHEDULABLE: tuple[str, ...] = ()

    frozen_table: Tensor | None

    def __init__(
        self,
        num_nodes: int,
        n: FanIn = 6,
        *,
        regularizer: Annotated[str | dict[str, Any] | None, PartOf("regularizer")] = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        try:
            _check_fan_in(n)
        except ValueError as error:
            raise ConfigError(f"n={n}: {error}.") from None
        if num_nodes < 1:
            raise ConfigError(f"num_nodes={num_nodes}: must be at least 1.")
        self.num_nodes = num_nodes
        self.n = n
        self.seed = seed
        self.soft = False
        self.register_buffer("frozen_table", None)
        self.regularizer: Regularizer | None = None
        if regularizer is not None:
            self.regularizer = REGISTRY.build("regularizer", regularizer)
            if self.regularizer.needs_table and type(self).real_table is LUTNodes.real_table:
                raise ConfigError(f"regularizer={_name(regularizer)}: needs tables; {type(self).__name__} have none.")

    def relaxed(self, routed: Tensor) -> Tensor:
        """What is trained: differentiable outputs in [0, 1].

        It must take N from the shape of its arguments and parameters, because a view of one node calls it with
        parameters whose leading dimension is 1.

        Parameters
        ----------
        routed : Tensor
            Routed inputs, ``(B, N, n)``.

        Returns
        -------
        Tensor
            ``(B, N)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must supply relaxed(routed)")

    def relaxed_fused(self, x: Tensor, wiring: Wiring | None, flips: Flips | None) -> Tensor:
        """``relaxed`` with routing and flips inside one op; only for banks that ``can_fuse`` while training."""
        raise NotImplementedError(f"{type(self).__name__} cannot route by itself")

    @torch.no_grad()
    def tabulate(self) -> Tensor:
        """The truth table of the parameters as they are, bool ``(N, K)``, by enumeration of all 2^n inputs.

        An entry is 1 where the relaxation is at least 1/2. Nodes that compute a logit override this and compare the
        logit with 0, because a sigmoid rounds to 1/2 on both sides.
        """
        addresses = torch.arange(2**self.n)
        bits = (addresses[:, None] >> torch.arange(self.n)) & 1
        parameter = next(self.parameters(), torch.empty(0))
        bits = bits.to(parameter)
        # a view of one node calls it with parameters of one row
        rows = len(parameter) or self.num_nodes
        training = self.training
        self.training = False
        try:
            chunks = [self.relaxed(chunk[:, None, :].expand(-1, rows, -1)) >= 0.5 for chunk in bits.split(_CHUNK)]
        finally:
            self.training = training
        return torch.cat(chunks).t().contiguous()

    def initial_values(
        self, initializer: str | Mapping[str, Any], shape: tuple[int, int], purpose: str = "weight"
    ) -> Tensor:
        """Initial values of a parameter, from a stream of random numbers of its own.

        Parameters
        ----------
        initializer : str or mapping
            Registered initialiser: its name, or a mapping of ``name`` and options.
        shape : tuple of int
            ``(N, M)``, M values per node.
        purpose : str
            What the values are for: parameters of one bank with different purposes share no random numbers.

        Raises
        ------
        ConfigError
            If the initialiser makes tables, and the nodes have none.
        """
        initialize = REGISTRY.build("initializer", initializer)
        if initialize.gives_table:
            raise ConfigError(f"initializer={_name(initializer)}: makes tables; {type(self).__name__} have none.")
        return initialize(shape, generator(self.seed, purpose))

    def regularized(self) -> Tensor:
        """What a regulariser penalises: all parameters, flattened per node, ``(N, M)``."""
        return torch.cat([parameter.reshape(len(parameter), -1) for parameter in self.parameters()], dim=1)

    def real_table(self) -> Tensor:
        """The table of real numbers that is trained, ``(N, K)``, differentiable; only of nodes that have one."""
        raise NotImplementedError(f"{type(self).__name__} has no table of its own")

    def regularization(self) -> Tensor:
        """The regulariser's penalty times its weight, 0-dimensional; 0 without a regulariser and once frozen."""
        if self.regularizer is None or self.is_frozen:
            return next(self.parameters(), torch.empty(0)).new_zeros(())
        values = self.real_table() if self.regularizer.needs_table else self.regularized()
        return self.regularizer.weight * self.regularizer(values)

    def truth_table(self) -> Tensor:
        """The truth table, bool ``(N, K)``; entry a of a row is the output for address a, least significant bit first.

        A frozen bank returns the table that it was frozen with.
        """
        return self.tabulate() if self.frozen_table is None else self.frozen_table

    @property
    def is_frozen(self) -> bool:
        """Whether the bank is its stored truth table, in every mode."""
        return self.frozen_table is not None

    @property
    def is_relaxed(self) -> bool:
        """Whether a forward evaluates the relaxation: in training, and in eval mode within ``soft``."""
        return not self.is_frozen and (self.training or self.soft)

    @property
    def can_fuse(self) -> bool:
        """Whether ``fused`` works in the present mode; truth tables always can be looked up with routing inside."""
        return not self.is_relaxed

    def forward(self, routed: Tensor) -> Tensor:
        """Outputs ``(B, N)`` of routed inputs ``(B, N, n)``: the relaxation, or in eval mode the truth table."""
        if self.is_relaxed:
            return self.relaxed(routed)
        return lookup(routed.flatten(1), self._table_for(routed))

    def fused(self, x: Tensor, wiring: Wiring | None = None, flips: Flips | None = None) -> Tensor:
        """The same as ``forward`` without forming ``(B, N, n)``.

        Parameters
        ----------
        x : Tensor
            Inputs of the layer, ``(B, F)``; without a wiring already routed, ``(B, N * n)``.
        wiring : Wiring, optional
            Which inputs each node reads.
        flips : Flips, optional
            Routed copies to flip; only in training.

        Returns
        -------
        Tensor
            ``(B, N)``.
        """
        if self.is_relaxed:
            return self.relaxed_fused(x, wiring, flips)
        return lookup(x, self._table_for(x), wiring=wiring)

    def __getitem__(self, node: int) -> NodeView:
        """Node ``node`` of the bank, a callable that maps ``(B, n)`` to ``(B, 1)``."""
        if not -self.num_nodes <= node < self.num_nodes:
            raise IndexError(f"node {node} of a bank of {self.num_nodes}")
        return NodeView(bank=self, node=node % self.num_nodes)

    def __len__(self) -> int:
        return self.num_nodes

    def __iter__(self) -> Iterator[NodeView]:
        return (self[node] for node in range(self.num_nodes))

    def freeze(self) -> None:
        """Store the truth table as a buffer and use it from now on, in every mode; parameters stop being trained.

        The state_dict of a frozen bank fits a bank that was frozen too: build it, ``freeze()`` it, then load.
        """
        self.frozen_table = self.truth_table().detach().clone()
        self.requires_grad_(False)

    def extra_repr(self) -> str:
        return f"num_nodes={self.num_nodes}, n={self.n}" + (", frozen" if self.is_frozen else "")

    def _table_for(self, x: Tensor) -> Tensor:
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        return self.truth_table().to(dtype)


@dataclass(frozen=True)
class NodeView:
    """One node of a bank, as a plain callable; gradients reach the bank's parameters.

    It costs a call of the bank for one node: for layers written node by node, not for large ones.
    """

    bank: LUTNodes
    node: int

    def __call__(self, routed: Tensor) -> Tensor:
        """Outputs ``(B, 1)`` of this node's inputs ``(B, n)``."""
        if routed.dim() != 2 or routed.shape[1] != self.bank.n:
            raise ValueError(f"a node expects inputs of shape (batch, {self.bank.n}), got {tuple(routed.shape)}")
        rows = {name: parameter[self.node : self.node + 1] for name, parameter in self.bank.named_parameters()}
        if self.bank.frozen_table is not None:
            rows["frozen_table"] = self.bank.frozen_table[self.node : self.node + 1]
        output: Tensor = torch.func.functional_call(self.bank, rows, (routed.unsqueeze(1),))
        return output


class TableNodes(LUTNodes):
    """A bank whose nodes are tables of real numbers: entry a is 1 in the truth table where its weight is at least 0.

    A kind of node supplies ``relaxed_fused``, which serves both the routed and the fused form, and where its weights
    are not the logits of its table, ``real_table`` and ``from_logits``.

    Parameters
    ----------
    num_nodes, n, seed
        As of ``LUTNodes``.
    initializer : str or mapping
        Registered initialiser of the weights: its name, or a mapping of ``name`` and options.
    regularizer : str or mapping, optional
        Registered penalty on the weights.

    Attributes
    ----------
    weight : nn.Parameter
        ``(N, K)``.
    """

    def __init__(
        self,
        num_nodes: int,
        n: FanIn = 6,
        *,
        initializer: Annotated[str | dict[str, Any], PartOf("initializer")] = "normal",
        regularizer: Annotated[str | dict[str, Any] | None, PartOf("regularizer")] = None,
        seed: int = 42,
    ) -> None:
        super().__init__(num_nodes, n, regularizer=regularizer, seed=seed)
        self.weight = nn.Parameter(self.initial_values(initializer, self.weight_shape))

    @property
    def weight_shape(self) -> tuple[int, int]:
        """The shape of the weights: ``(N, K)``, one per entry, where a kind of node does not say otherwise."""
        return self.num_nodes, 2**self.n

    def from_logits(self, logits: Tensor) -> Tensor:
        """The weights of nodes whose tables have these logits, ``(N, K)``: how an initialiser that makes tables acts.

        Here they are the logits themselves.
        """
        return logits

    def initial_values(
        self, initializer: str | Mapping[str, Any], shape: tuple[int, int], purpose: str = "weight"
    ) -> Tensor:
        initialize = REGISTRY.build("initializer", initializer)
        draws = generator(self.seed, purpose)
        if initialize.gives_table:
            return self.from_logits(initialize((self.num_nodes, 2**self.n), draws))
        return initialize(shape, draws)

    def relaxed(self, routed: Tensor) -> Tensor:
        return self.relaxed_fused(routed.flatten(1), None, None)

    def real_table(self) -> Tensor:
        return self.weight

    @torch.no_grad()
    def tabulate(self) -> Tensor:
        return self.real_table() >= 0

    @property
    def can_fuse(self) -> bool:
        return True
