"""interpolate against the sum over all entries, in float64, with all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from difflut_lab.ops import Flips, Wiring, flip_mask, interpolate

OP = torch.ops.difflut_lab.interpolate.default
BACKWARD = torch.ops.difflut_lab.interpolate_backward.default


def brute(routed: Tensor, table: Tensor) -> Tensor:
    """The definition, for routed inputs ``(N, n, B)``; ``(B, N)``."""
    address = torch.arange(table.shape[1]).unsqueeze(1)
    terms = table.unsqueeze(2)
    for k in range(routed.shape[1]):
        x = routed[:, k : k + 1]
        terms = terms * torch.where(address >> k & 1 == 1, x, 1 - x)
    return terms.sum(dim=1).t()


def expected(
    x: Tensor, table: Tensor, indices: Tensor, gradient: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of x and gradient of the table, in float64."""
    x, table, gradient = x.detach().double(), table.detach().double().requires_grad_(), gradient.double()
    constant = indices < 0
    read = x.t()[indices.long().clamp_min(0)]
    routed = read.clamp(0, 1)
    if mask is not None:
        routed = torch.where(mask & (read != -torch.inf), 1 - routed, routed)
    routed = routed.masked_fill(constant.unsqueeze(2), 0).requires_grad_()
    y = brute(routed, table)
    routed_gradient, table_gradient = torch.autograd.grad(y, (routed, table), gradient)
    x_gradient = torch.zeros(x.shape[1], x.shape[0], dtype=torch.float64)
    x_gradient.index_add_(0, indices[~constant].long(), routed_gradient[~constant])
    return y.detach(), x_gradient.t() * ((x >= 0) & (x <= 1)), table_gradient


def bank(n: int, num_nodes: int = 7, num_inputs: int = 10, dtype: torch.dtype = torch.float64) -> tuple[Wiring, Tensor]:
    """A wiring with constants and repeated inputs, and a table."""
    indices = torch.randint(-1, num_inputs, (num_nodes, n), dtype=torch.int32)
    indices[0] = 3
    return Wiring(indices, num_inputs), torch.randn(num_nodes, 2**n, dtype=dtype, requires_grad=True)


def check(x: Tensor, table: Tensor, wiring: Wiring, flips: Flips | None = None, **tolerance: Any) -> None:
    """Output and gradients are those of the definition."""
    num_nodes, n = wiring.indices.shape
    mask = flip_mask(flips, num_nodes, n, x.shape[0]) if flips is not None else None
    y = interpolate(x, table, wiring, flips)
    gradient = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    x_gradient, table_gradient = torch.autograd.grad(y, (x, table), gradient)
    for got, want in zip(
        (y, x_gradient, table_gradient), expected(x, table, wiring.indices, gradient, mask), strict=True
    ):
        torch.testing.assert_close(got.double(), want, **tolerance)


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("flipped", [False, True])
def test_equals_the_definition(n: int, flipped: bool) -> None:
    wiring, table = bank(n)
    x = torch.rand(13, 10, dtype=torch.float64) * 1.4 - 0.2
    x = x.masked_fill(torch.rand(13, 10) < 0.1, -torch.inf).requires_grad_()
    flips = Flips(0.3, 11, torch.tensor(4), layer=2, sample_offset=5) if flipped else None
    check(x, table, wiring, flips)


@pytest.mark.parametrize("batch", [1, 3, 127])
@pytest.mark.parametrize("num_nodes", [1, 3, 127])
def test_odd_sizes_in_float32(batch: int, num_nodes: int) -> None:
    wiring, table = bank(6, num_nodes, dtype=torch.float32)
    check(torch.rand(batch, 10, requires_grad=True), table, wiring, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 500])
def test_in_several_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("difflut_lab.ops.shapes.CPU_CHUNK", chunk)
    wiring, table = bank(6, 31)
    check(torch.rand(13, 10, dtype=torch.float64, requires_grad=True), table, wiring, Flips(0.1, 3, torch.tensor(0)))


def test_many_inputs_per_node() -> None:
    wiring, table = bank(12, 2)
    x = torch.rand(2, 10, dtype=torch.float64)
    y = interpolate(x, table, wiring)
    routed = x.t()[wiring.indices.long().clamp_min(0)].masked_fill((wiring.indices < 0).unsqueeze(2), 0)
    torch.testing.assert_close(y, brute(routed, table))


def test_bits_read_entries() -> None:
    table = torch.randn(1, 16)
    bits = (torch.arange(16).unsqueeze(1) >> torch.arange(4) & 1).float()
    assert torch.equal(interpolate(bits, table)[:, 0], table[0])


def test_routed_inputs_need_no_wiring() -> None:
    _, table = bank(5)
    routed = torch.rand(9, 35, dtype=torch.float64, requires_grad=True)
    identity = Wiring(torch.arange(35, dtype=torch.int32).view(7, 5), 35)
    flips = Flips(0.3, 11, torch.tensor(4))
    gradient = torch.randn(9, 7, dtype=torch.float64)
    y, same = interpolate(routed, table, flips=flips), interpolate(routed, table, identity, flips)
    assert torch.equal(y, same)
    for got, want in zip(
        torch.autograd.grad(y, (routed, table), gradient),
        torch.autograd.grad(same, (routed, table), gradient),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_gradcheck() -> None:
    wiring, table = bank(4, 3)
    x = (torch.rand(5, 10, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, table: interpolate(x, table, wiring), (x, table))


def test_edges_and_strange_values() -> None:
    table = torch.randn(1, 4, requires_grad=True)
    x = torch.tensor([[0.0, 1.0], [-0.1, 1.1], [-torch.inf, torch.inf], [torch.nan, 0.5]], requires_grad=True)
    y = interpolate(x, table)
    assert torch.equal(y[:3, 0], table[0, 2].expand(3))
    assert y[3, 0].isnan()
    (gradient,) = torch.autograd.grad(y[:3].sum(), x)
    # the edges are inside
    torch.testing.assert_close(gradient[0], torch.stack([table[0, 3] - table[0, 2], table[0, 2] - table[0, 0]]))
    assert torch.equal(gradient[1:3], torch.zeros(2, 2))


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in several layouts."""
    wide = torch.zeros(x.shape[0], 2 * x.shape[1], dtype=x.dtype)
    wide[:, ::2] = x
    tall = torch.zeros(x.shape[1] + 3, x.shape[0], dtype=x.dtype)
    tall[2:-1] = x.t()
    return {
        "batch-major": x.contiguous(),
        "feature-major": x.t().contiguous().t(),
        "every other column": wide[:, ::2],
        "slice of feature-major": tall[2:-1].t(),
    }


def test_any_layout_of_inputs_and_gradients() -> None:
    wiring, table = bank(6, dtype=torch.float32)
    values, gradient = torch.rand(20, 10), torch.randn(20, 7)
    results = []
    for x in layouts(values).values():
        for upstream in layouts(gradient).values():
            leaf = x.detach().requires_grad_()
            y = interpolate(leaf, table, wiring)
            results.append((y.detach(), *torch.autograd.grad(y, (leaf, table), upstream)))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got, want)


def test_any_layout_of_tables() -> None:
    wiring, table = bank(6, dtype=torch.float32)
    x = torch.rand(20, 10, requires_grad=True)
    results = []
    for stored in (table, table.detach().t().contiguous().t()):
        leaf = stored.detach().requires_grad_()
        y = interpolate(x, leaf, wiring)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, leaf))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_expanded_inputs_and_gradients() -> None:
    wiring, table = bank(6, dtype=torch.float32)
    row = torch.rand(1, 10, requires_grad=True)
    expanded = interpolate(row.expand(20, 10), table, wiring)
    copied = interpolate(row.repeat(20, 1), table, wiring)
    for got, want in zip(
        torch.autograd.grad(expanded.sum(), (row, table)), torch.autograd.grad(copied.sum(), (row, table)), strict=True
    ):
        assert torch.equal(got, want)


def test_is_stored_feature_major() -> None:
    wiring, table = bank(6, dtype=torch.float32)
    x = torch.rand(20, 10, requires_grad=True)
    y = interpolate(x, table, wiring)
    assert y.t().is_contiguous()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.t().is_contiguous()


def test_is_deterministic() -> None:
    wiring, table = bank(6, 300, 20, dtype=torch.float32)
    x = torch.rand(64, 20, requires_grad=True)
    gradient = torch.randn(64, 300)
    flips = Flips(0.1, 1, torch.tensor(3))
    runs = []
    for _ in range(3):
        y = interpolate(x, table, wiring, flips)
        runs.append((y.detach(), *torch.autograd.grad(y, (x, table), gradient)))
    for run in runs[1:]:
        assert all(torch.equal(got, want) for got, want in zip(run, runs[0], strict=True))


def test_backward_keeps_the_flips_of_its_forward() -> None:
    wiring, table = bank(4)
    x = torch.rand(9, 10, dtype=torch.float64, requires_grad=True)
    step = torch.tensor(3)
    y = interpolate(x, table, wiring, Flips(0.5, 1, step))
    step += 1
    want = expected(x, table, wiring.indices, torch.ones(9, 7), flip_mask(Flips(0.5, 1, torch.tensor(3)), 7, 4, 9))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], want[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32(dtype: torch.dtype) -> None:
    wiring, table = bank(6, dtype=torch.float32)
    x = torch.rand(20, 10).to(dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    y, want = interpolate(x, table, wiring), interpolate(wide, table, wiring)
    assert y.dtype == dtype
    assert torch.equal(y, want.to(dtype))
    gradients = torch.autograd.grad(y.sum(), (x, table))
    assert [gradient.dtype for gradient in gradients] == [dtype, torch.float32]
    for got, exact in zip(gradients, torch.autograd.grad(want.sum(), (wide, table)), strict=True):
        assert torch.equal(got, exact.to(got.dtype))


def test_autocast_changes_nothing() -> None:
    wiring, table = bank(6, dtype=torch.float32)
    x = torch.rand(20, 10, requires_grad=True)
    want = interpolate(x, table, wiring)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = interpolate(x, table, wiring)
        gradients = torch.autograd.grad(y.sum(), (x, table))
    assert torch.equal(y, want)
    for got, exact in zip(gradients, torch.autograd.grad(want.sum(), (x, table)), strict=True):
        assert torch.equal(got, exact)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_takes_bits(dtype: torch.dtype) -> None:
    wiring, table = bank(6, dtype=torch.float32)
    bits = torch.rand(20, 10) < 0.5
    y = interpolate(bits.to(dtype), table, wiring)
    assert y.dtype == torch.float32
    assert torch.equal(y, interpolate(bits.float(), table, wiring))


def test_computes_only_what_is_needed() -> None:
    wiring, table = bank(6, dtype=torch.float32)
    x = torch.rand(20, 10, requires_grad=True)
    (alone,) = torch.autograd.grad(interpolate(x.detach(), table, wiring).sum(), table)
    # neither the inverse of the wiring was made
    assert wiring._inverse is None
    (x_alone,) = torch.autograd.grad(interpolate(x, table.detach(), wiring).sum(), x)
    x_both, both = torch.autograd.grad(interpolate(x, table, wiring).sum(), (x, table))
    assert torch.equal(alone, both) and torch.equal(x_alone, x_both)
    assert not interpolate(x.detach(), table.detach(), wiring).requires_grad


def test_saves_little_for_backward() -> None:
    wiring, table = bank(6, 50, dtype=torch.float32)
    x = torch.rand(32, 10, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        interpolate(x, table, wiring, Flips(0.1, 1, torch.tensor(0)))
    given = {x.data_ptr(), table.data_ptr(), wiring.indices.data_ptr()} | {part.data_ptr() for part in wiring.inverse}
    made = [tensor for tensor in saved if tensor.data_ptr() not in given]
    # the flips, a bit each
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in made] == [(torch.uint8, (50, 6, 4))]


def test_empty_batch() -> None:
    wiring, table = bank(6, dtype=torch.float32)
    x = torch.rand(0, 10, requires_grad=True)
    y = interpolate(x, table, wiring)
    assert y.shape == (0, 7)
    x_gradient, table_gradient = torch.autograd.grad(y.sum(), (x, table))
    assert x_gradient.shape == x.shape
    assert torch.equal(table_gradient, torch.zeros(7, 64))


@pytest.mark.parametrize("wired", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
def test_opcheck(wired: bool, flipped: bool) -> None:
    wiring, table = bank(3, dtype=torch.float32)
    x = torch.rand(9, 10 if wired else 21, requires_grad=True)
    wires = (wiring.indices, True, *wiring.inverse) if wired else (None, False, None, None)
    step = torch.tensor(2) if flipped else None
    torch.library.opcheck(OP, (x, table, *wires, step, 6000, 5, 1, 3))
    packed = OP(x, table, *wires, step, 6000, 5, 1, 3)[1].detach() if flipped else None
    torch.library.opcheck(
        BACKWARD, (torch.randn(9, 7), x.detach(), table.detach(), *wires, packed, 3, True, not flipped)
    )


def test_compiles_into_one_graph() -> None:
    wiring, table = bank(4, dtype=torch.float32)
    x = torch.rand(9, 10, requires_grad=True)

    def run(x: Tensor, table: Tensor, step: Tensor) -> Tensor:
        y = interpolate(x * 0.9, table, wiring, Flips(0.3, 5, step))
        step.add_(1)
        return y.square()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for start in range(2):
        steps = [torch.tensor(start), torch.tensor(start)]
        y, want = compiled(x, table, steps[0]), run(x, table, steps[1])
        assert steps[0] == steps[1] == start + 1
        assert torch.equal(y, want)
        assert y.stride() == want.stride()
        for got, exact in zip(
            torch.autograd.grad(y.sum(), (x, table)), torch.autograd.grad(want.sum(), (x, table)), strict=True
        ):
            assert torch.equal(got, exact)


@pytest.mark.parametrize(
    ("x", "table", "wiring", "message"),
    [
        (torch.rand(3), torch.rand(2, 4), None, r"x: must have shape \(B, F\)"),
        (torch.rand(3, 5), torch.rand(2, 4), None, "x: must have 4 inputs"),
        (torch.rand(3, 4), torch.rand(2, 5), None, "2\\^n entries"),
        (torch.rand(3, 4), torch.rand(8), None, r"table: must have shape \(N, 2\^n\)"),
        (torch.rand(3, 4), torch.rand(2, 4), Wiring(torch.zeros(2, 3, dtype=torch.int32), 4), "wiring: must have"),
        (torch.rand(3, 5), torch.rand(2, 4), Wiring(torch.zeros(2, 2, dtype=torch.int32), 4), "x: must have 4 inputs"),
    ],
)
def test_refuses_shapes_that_do_not_fit(x: Tensor, table: Tensor, wiring: Wiring | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interpolate(x, table, wiring)
