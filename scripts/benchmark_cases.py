"""What ``benchmark.py`` measures, and what other libraries have in its place.

Ops, layers, whole training steps, and packed layers in inference.

Shape letters: B batch, F inputs, N nodes, n inputs per node, K = 2^n entries of a table.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from difflut_lab import REGISTRY
from difflut_lab.layers import LayerConfig
from difflut_lab.models import LUTMLP
from difflut_lab.ops import Wiring, efd_table, interpolate, lookup, route
from difflut_lab.ternary import TernaryLinear, pack
from difflut_lab.ternary.base import ActivationBits

GROUPS = ("ops", "layers", "steps", "packed")
# tokens, inputs and outputs of packed layers
PACKED = ((1, 4096, 4096), (32, 1024, 1024), (256, 1024, 1024))
CANDIDATES = 32
# one score per input, slot and node: beyond so many products with scores a run takes seconds
MOST_PRODUCTS = 128 * 2000 * 6 * 1568
PEERS = ("torchlogix", "difflogic", "torch_dwn")
# beyond it they take gigabytes
PEERS_LARGEST_BATCH = 128
FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is, and where it lies."""

    batch: int
    inputs: int
    nodes: int
    n: int
    """0 of layers that have no nodes."""
    device: str

    def __str__(self) -> str:
        return (f"n = {self.n}, " if self.n else "") + f"batch {self.batch}"


@dataclass(frozen=True, kw_only=True)
class Step:
    """A forward, and a backward of its output, that can be repeated."""

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], None]
    leaves: Sequence[Tensor]
    """Their gradients are forgotten before every run."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The least work of forward and backward."""

    operations: tuple[int, int] | None = None
    """Multiply-adds, a lone multiplication or addition counted as one."""
    traffic: tuple[int, int] | None = None
    """Bytes read and written, each tensor once."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to measure; all of its variants take turns."""

    group: str
    what: str
    own: Callable[[], Step]
    others: Mapping[str, Callable[[], Step]] = field(default_factory=dict)
    """By name, what stands beside the backends of this package."""
    counts: Counts = field(default_factory=Counts)


def cases(sizes: Sizes, groups: Sequence[str], peers: Mapping[str, ModuleType], quick: bool) -> Iterator[Case]:
    """All cases of the given groups and sizes.

    Parameters
    ----------
    sizes : Sizes
        How large they are.
    groups : sequence of str
        Some of ``GROUPS``.
    peers : mapping
        The libraries to compare with, as ``find_peers`` gives them.
    quick : bool
        Leave out what takes seconds.
    """
    s = sizes
    if "ops" in groups:
        yield Case(group="ops", what="interpolate", own=partial(_interpolate, s), counts=_interpolate_counts(s))
        yield Case(group="ops", what="lookup + EFD table", own=partial(_lookup, s), counts=_lookup_counts(s))
        few = min(CANDIDATES, s.inputs)
        yield Case(
            group="ops",
            what=f"route, {few} candidates",
            own=partial(_route, s, few),
            counts=_route_counts(s, few),
        )
        if few < s.inputs and not quick and s.batch * s.nodes * s.n * s.inputs <= MOST_PRODUCTS:
            yield Case(
                group="ops",
                what="route, all inputs",
                own=partial(_route, s, s.inputs),
                counts=_route_counts(s, s.inputs),
            )
    if "layers" in groups:
        others = {"nn.Linear": partial(_module, nn.Linear, s)}
        yield Case(
            group="layers",
            what="random_routing, probabilistic",
            own=partial(_layer, s, "random_routing", "probabilistic"),
            others=others | _soft_peers(s, peers),
            counts=_interpolate_counts(s),
        )
        yield Case(
            group="layers",
            what="random_routing, dwn",
            own=partial(_layer, s, "random_routing", "dwn"),
            others=_hard_peers(s, peers),
            counts=_lookup_counts(s),
        )
        yield Case(
            group="layers",
            what="learnable_routing, dwn",
            own=partial(_layer, s, "learnable_routing", "dwn", candidates=min(CANDIDATES, s.inputs)),
        )
    if "steps" in groups:
        for node in ("probabilistic", "dwn"):
            for flips in (0.0, 0.05):
                what = f"lut_mlp, {node}" + (f", flips {flips:.0%}" if flips else "")
                yield Case(group="steps", what=what, own=partial(_network, s, node, flips))


def packed_cases(device: str) -> Iterator[tuple[Sizes, Case]]:
    """Packed linear layers, W1.58 with 8-bit and with float activations, beside ``nn.Linear``; there is no backward."""
    for tokens, inputs, outputs in PACKED:
        sizes = Sizes(batch=tokens, inputs=inputs, nodes=outputs, n=0, device=device)
        dense = nn.Linear(inputs, outputs)
        kinds: tuple[tuple[ActivationBits, str], ...] = ((8, "W1.58A8"), (None, "W1.58"))
        for bits, name in kinds:
            layer = pack(TernaryLinear(inputs, outputs, activation_bits=bits))
            memory, packed = (sum(t.nbytes for t in module.state_dict().values()) for module in (dense, layer))
            yield (
                sizes,
                Case(
                    group="packed",
                    what=f"packed linear, {name}, {inputs} -> {outputs}, 1 / {memory / packed:.1f} of the memory",
                    own=partial(_inference, sizes, layer),
                    others={"nn.Linear": partial(_inference, sizes, dense)},
                ),
            )


def _inference(s: Sizes, module: nn.Module) -> Step:
    module.to(s.device)
    x = torch.randn(s.batch, s.inputs, device=s.device)
    return Step(forward=torch.inference_mode()(lambda: module(x)), backward=lambda y: None, leaves=())


def _inputs(s: Sizes) -> Tensor:
    """``(B, F)`` as a layer below leaves it: a transposed view."""
    return torch.rand(s.inputs, s.batch, device=s.device).t().requires_grad_()


def _backward(s: Sizes, outputs: int) -> Callable[[Tensor], None]:
    """A backward from a gradient ``(B, outputs)``, as a layer above leaves it."""
    gradient = torch.randn(outputs, s.batch, device=s.device).t()
    return lambda y: y.backward(gradient)


def _table(s: Sizes) -> tuple[Tensor, Wiring]:
    table = torch.rand(s.nodes, 2**s.n, device=s.device).requires_grad_()
    indices = torch.rand(s.nodes, s.inputs).topk(s.n).indices.int()
    return table, Wiring(indices.to(s.device), s.inputs)


def _interpolate(s: Sizes) -> Step:
    x, (table, wiring) = _inputs(s), _table(s)
    return Step(forward=lambda: interpolate(x, table, wiring), backward=_backward(s, s.nodes), leaves=(x, table))


def _lookup(s: Sizes) -> Step:
    x, (table, wiring) = _inputs(s), _table(s)
    return Step(
        forward=lambda: lookup(x, table, efd_table(table), wiring),
        backward=_backward(s, s.nodes),
        leaves=(x, table),
    )


def _route(s: Sizes, count: int) -> Step:
    x = _inputs(s)
    scores = torch.empty(s.nodes, s.n, count, device=s.device).normal_(0, 0.01).requires_grad_()
    candidates = None
    if count < s.inputs:
        drawn = torch.rand(s.nodes * s.n, s.inputs).topk(count).indices.int()
        candidates = Wiring(drawn.to(s.device), s.inputs)
    return Step(forward=lambda: route(x, scores, candidates), backward=_backward(s, s.nodes * s.n), leaves=(x, scores))


def _layer(s: Sizes, name: str, node: str, **options: Any) -> Step:
    layer = REGISTRY.get("layer", name)(s.inputs, s.nodes, node, s.n, **options).to(s.device)
    x = _inputs(s)
    return Step(forward=lambda: layer(x), backward=_backward(s, s.nodes), leaves=(x, *layer.parameters()))


def _module(make: Callable[[int, int], nn.Module], s: Sizes) -> Step:
    """A layer from elsewhere, made of the numbers of its inputs and outputs; its tensors are batch-first."""
    module = make(s.inputs, s.nodes).to(s.device)
    x = torch.rand(s.batch, s.inputs, device=s.device).requires_grad_()
    gradient = torch.randn(s.batch, s.nodes, device=s.device)
    return Step(
        forward=lambda: module(x),
        backward=lambda y: y.backward(gradient),
        leaves=(x, *module.parameters()),
    )


def _network(s: Sizes, node: str, flip_probability: float) -> Step:
    """A network of two layers, its loss, and Adam's step in the backward."""
    features, classes = s.inputs // 2, 10
    model = LUTMLP(
        widths=[s.nodes, max(1, s.nodes // 2)],
        input_shape=(features,),
        num_classes=classes,
        encoder={"name": "distributive_thermometer", "bits": 2},
        layer={"name": "random_routing"},
        node={"name": node, "n": s.n},
        head={"name": "group_sum", "tau": 3.3333},
        layer_config=vars(LayerConfig(flip_probability=flip_probability)),
    )
    model.calibrate(torch.rand(1000, features))
    model.to(s.device)
    x, labels = torch.rand(s.batch, features, device=s.device), torch.randint(classes, (s.batch,), device=s.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)

    def backward(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()

    return Step(
        forward=lambda: functional.cross_entropy(model(x), labels),
        backward=backward,
        leaves=tuple(model.parameters()),
    )


def find_peers() -> tuple[dict[str, ModuleType], list[str]]:
    """The other libraries that can be imported here, and a line for each that cannot."""
    found, missing = {}, []
    for name in PEERS:
        try:
            found[name] = importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing.append(f"{name}: not installed" if error.name == name else f"{name}: {error}")
        except Exception as error:  # whatever a library does at its import
            missing.append(f"{name}: {error}")
    return found, missing


def _soft_peers(s: Sizes, peers: Mapping[str, ModuleType]) -> dict[str, Callable[[], Step]]:
    """What others have for probabilistic nodes with a random wiring."""
    found: dict[str, Callable[[], Step]] = {}
    if s.batch > PEERS_LARGEST_BATCH:
        return found
    if "torchlogix" in peers:
        layers = importlib.import_module("torchlogix.layers")
        for name in ("light", "warp"):
            dense = partial(layers.LogicDense, device=s.device, lut_rank=s.n, parametrization=name)
            found[f"torchlogix {name}"] = partial(_module, dense, s)
    if "difflogic" in peers and s.n == 2:
        found["difflogic"] = lambda: _silent(_module(partial(peers["difflogic"].LogicLayer, device=s.device), s))
    return found


def _hard_peers(s: Sizes, peers: Mapping[str, ModuleType]) -> dict[str, Callable[[], Step]]:
    """What others have for dwn nodes with a random wiring."""
    if "torch_dwn" not in peers or s.batch > PEERS_LARGEST_BATCH:
        return {}
    return {"torch_dwn": partial(_module, partial(peers["torch_dwn"].LUTLayer, n=s.n), s)}


def _silent(step: Step) -> Step:
    """A step without what its library prints in every forward."""

    def forward() -> Tensor:
        with contextlib.redirect_stdout(io.StringIO()):
            return step.forward()

    return Step(forward=forward, backward=step.backward, leaves=step.leaves)


def _halves(n: int) -> tuple[int, int]:
    """Entries of the products of a node's lower and of its upper inputs."""
    return 1 << n // 2, 1 << n - n // 2


def _interpolate_counts(s: Sizes) -> Counts:
    """Counts of the split form, in which products of the lower and of the upper inputs are joined by the table.

    The products of h inputs take ``P(h) = 2 * 2^h - 3`` operations: a subtraction for the first input, and for each
    further one a multiplication and a subtraction per product so far. Forward joins them with K multiply-adds and one
    more per upper product; L and H are the numbers of lower and upper products: ``P + K + H``. Backward makes them
    again, weights the upper ones with the output's gradient (H), takes the gradient of the table (K), of the lower (K)
    and of the upper products (K + H), folds each half to its inputs, ``G(h) = 3 * 2^h - 5``, and adds them up (n):
    ``P + 3 K + 2 H + G + n``. For n = 2, 4, 6: 8, 30, 98 forward and 22, 84, 278 backward, per node and sample.
    """
    lower, upper = _halves(s.n)
    entries, samples = 1 << s.n, s.batch * s.nodes
    # a half without inputs has one product, 1
    halves = [size for size in (lower, upper) if size > 1]
    products = sum(2 * size - 3 for size in halves)
    folds = sum(3 * size - 5 for size in halves)
    x, y, table, wiring = FLOAT * s.batch * s.inputs, FLOAT * samples, FLOAT * s.nodes * entries, FLOAT * s.nodes * s.n
    return Counts(
        operations=(
            samples * (products + entries + upper),
            samples * (products + 3 * entries + 2 * upper + folds + s.n),
        ),
        traffic=(x + table + wiring + y, 2 * x + 2 * table + wiring + y),
    )


def _lookup_counts(s: Sizes) -> Counts:
    """Bytes of a lookup: the gradient table ``(N, n, K)`` is written by the forward and read by the backward."""
    samples, entries = s.batch * s.nodes, 1 << s.n
    x, y, table, wiring = FLOAT * s.batch * s.inputs, FLOAT * samples, FLOAT * s.nodes * entries, FLOAT * s.nodes * s.n
    address = samples * (1 if s.n <= 8 else 2)
    return Counts(
        traffic=(x + table + s.n * table + wiring + y + address, address + y + s.n * table + wiring + x + table)
    )


def _route_counts(s: Sizes, count: int) -> Counts:
    """Counts of routing: the backward has a multiply-add per score and sample, and at least one per slot for inputs."""
    slots = s.nodes * s.n
    x, y, scores = FLOAT * s.batch * s.inputs, FLOAT * s.batch * slots, FLOAT * slots * count
    candidates = 0 if count == s.inputs else scores
    return Counts(
        operations=(0, s.batch * slots * (count + 1)),
        traffic=(x + scores + y, 2 * x + 2 * scores + candidates + y),
    )
