"""lookup against a loop over samples, nodes and inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from difflut_lab.ops import Flips, Wiring, efd_table, flip_mask, lookup
from difflut_lab.ops.lookup.reference import _add_scattered, _add_sorted

OP = torch.ops.difflut_lab.lookup.default
BACKWARD = torch.ops.difflut_lab.lookup_backward.default


def expected(
    x: Tensor, table: Tensor, slope: Tensor, indices: Tensor, gradient: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of x and gradient of the table: the definition, entry by entry."""
    y = torch.zeros(x.shape[0], table.shape[0], dtype=table.dtype)
    x_gradient, table_gradient = torch.zeros_like(x), torch.zeros_like(table)
    for b in range(x.shape[0]):
        for j in range(table.shape[0]):
            address = 0
            for k, f in enumerate(indices[j].tolist()):
                bit = f >= 0 and bool(x[b, f] >= 0.5)
                if mask is not None and f >= 0 and x[b, f] != -torch.inf:
                    bit ^= bool(mask[j, k, b])
                address |= bit << k
            y[b, j] = table[j, address]
            table_gradient[j, address] += gradient[b, j]
            for k, f in enumerate(indices[j].tolist()):
                if f >= 0:
                    x_gradient[b, f] += slope[j, k, address] * gradient[b, j]
    return y, x_gradient, table_gradient


def bank(
    n: int, num_nodes: int = 5, num_inputs: int = 10, dtype: torch.dtype = torch.float64
) -> tuple[Wiring, Tensor, Tensor]:
    """A wiring with constants and repeated inputs, a table, and any gradient table."""
    indices = torch.randint(-1, num_inputs, (num_nodes, n), dtype=torch.int32)
    indices[0] = 3
    table = torch.randn(num_nodes, 2**n, dtype=dtype, requires_grad=True)
    return Wiring(indices, num_inputs), table, torch.randn(num_nodes, n, 2**n, dtype=dtype)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11])
@pytest.mark.parametrize("flipped", [False, True])
def test_equals_the_definition(n: int, flipped: bool) -> None:
    wiring, table, slope = bank(n)
    x = torch.rand(7, 10, dtype=torch.float64) * 1.4 - 0.2
    x = x.masked_fill(torch.rand(7, 10) < 0.1, -torch.inf).requires_grad_()
    flips = Flips(0.3, 11, torch.tensor(4), layer=2, sample_offset=5) if flipped else None
    mask = flip_mask(flips, 5, n, 7) if flips is not None else None
    y = lookup(x, table, slope, wiring, flips)
    gradient = torch.randn_like(y)
    got = (y.detach(), *torch.autograd.grad(y, (x, table), gradient))
    for result, want in zip(
        got, expected(x.detach(), table.detach(), slope, wiring.indices, gradient, mask), strict=True
    ):
        torch.testing.assert_close(result, want)


@pytest.mark.parametrize("batch", [1, 3, 127])
@pytest.mark.parametrize("num_nodes", [1, 3, 31])
def test_odd_sizes_in_float32(batch: int, num_nodes: int) -> None:
    wiring, table, slope = bank(4, num_nodes, dtype=torch.float32)
    x = torch.rand(batch, 10, requires_grad=True)
    y = lookup(x, table, slope, wiring)
    gradient = torch.randn_like(y)
    got = (y.detach(), *torch.autograd.grad(y, (x, table), gradient))
    for result, want in zip(
        got, expected(x.detach(), table.detach(), slope, wiring.indices, gradient, None), strict=True
    ):
        torch.testing.assert_close(result, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 500])
def test_in_several_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wiring, table, slope = bank(6, 31)
    x = torch.rand(13, 10, dtype=torch.float64, requires_grad=True)
    flips = Flips(0.1, 3, torch.tensor(0))
    runs = []
    for size in (1 << 18, chunk):
        monkeypatch.setattr("difflut_lab.ops.shapes.CPU_CHUNK", size)
        y = lookup(x, table, slope, wiring, flips)
        runs.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, table))))
    assert all(torch.equal(got, want) for got, want in zip(*runs, strict=True))


def test_both_sums_at_addresses_agree() -> None:
    address, values = torch.randint(0, 16, (5, 99), dtype=torch.uint8), torch.randn(5, 99, dtype=torch.float64)
    torch.testing.assert_close(_add_sorted(address, values, 16), _add_scattered(address, values, 16))


def test_addresses_are_lsb_first_and_bits_are_at_least_a_half() -> None:
    table = torch.arange(8.0).unsqueeze(0)
    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.49, 2.0], [-1.0, torch.inf, torch.nan]])
    assert lookup(x, table)[:, 0].tolist() == [1, 4, 5, 2]


def test_routed_inputs_need_no_wiring() -> None:
    _, table, slope = bank(6)
    routed = torch.rand(9, 30, dtype=torch.float64, requires_grad=True)
    identity = Wiring(torch.arange(30, dtype=torch.int32).view(5, 6), 30)
    flips = Flips(0.3, 11, torch.tensor(4))
    gradient = torch.randn(9, 5, dtype=torch.float64)
    y, same = lookup(routed, table, slope, flips=flips), lookup(routed, table, slope, identity, flips)
    assert torch.equal(y, same)
    for got, want in zip(
        torch.autograd.grad(y, (routed, table), gradient),
        torch.autograd.grad(same, (routed, table), gradient),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_without_a_gradient_table_inputs_get_none() -> None:
    wiring, table, slope = bank(6)
    x = torch.rand(9, 10, dtype=torch.float64, requires_grad=True)
    lookup(x, table, None, wiring).sum().backward()
    assert x.grad is None
    assert wiring._inverse is None
    (table_gradient,) = torch.autograd.grad(lookup(x, table, slope, wiring).sum(), table)
    assert table.grad is not None and torch.equal(table.grad, table_gradient)


def test_gradient_table_receives_no_gradient() -> None:
    wiring, table, slope = bank(6)
    slope.requires_grad_()
    x = torch.rand(9, 10, dtype=torch.float64, requires_grad=True)
    lookup(x, table, slope, wiring).sum().backward()
    assert slope.grad is None
    assert x.grad is not None and table.grad is not None


def layouts(x: Tensor) -> list[Tensor]:
    """The same values batch-major, feature-major, as every other column, and as a slice of feature-major storage."""
    wide = torch.zeros(x.shape[0], 2 * x.shape[1], dtype=x.dtype)
    wide[:, ::2] = x
    tall = torch.zeros(x.shape[1] + 3, x.shape[0], dtype=x.dtype)
    tall[2:-1] = x.t()
    return [x.contiguous(), x.t().contiguous().t(), wide[:, ::2], tall[2:-1].t()]


def test_any_layout_of_inputs_and_gradients() -> None:
    wiring, table, slope = bank(6, dtype=torch.float32)
    results = []
    gradients = layouts(torch.randn(20, 5))
    for x in layouts(torch.rand(20, 10)):
        for upstream in gradients:
            leaf = x.detach().requires_grad_()
            y = lookup(leaf, table, slope, wiring)
            results.append((y.detach(), *torch.autograd.grad(y, (leaf, table), upstream)))
    for result in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(result, results[0], strict=True))


def test_any_layout_of_tables() -> None:
    wiring, table, slope = bank(6, dtype=torch.float32)
    x = torch.rand(20, 10, requires_grad=True)
    results = []
    for stored, slopes in [(table, slope), (table.detach().t().contiguous().t(), slope.mT.contiguous().mT)]:
        leaf = stored.detach().requires_grad_()
        y = lookup(x, leaf, slopes, wiring)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, leaf))))
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))


def test_expanded_inputs_and_gradients() -> None:
    wiring, table, slope = bank(6, dtype=torch.float32)
    row = torch.rand(1, 10, requires_grad=True)
    expanded = lookup(row.expand(20, 10), table, slope, wiring)
    copied = lookup(row.repeat(20, 1), table, slope, wiring)
    for got, want in zip(
        torch.autograd.grad(expanded.sum(), (row, table)), torch.autograd.grad(copied.sum(), (row, table)), strict=True
    ):
        assert torch.equal(got, want)


def test_is_stored_feature_major_and_deterministic() -> None:
    wiring, table, slope = bank(6, 300, 20, dtype=torch.float32)
    x = torch.rand(64, 20, requires_grad=True)
    gradient = torch.randn(64, 300)
    flips = Flips(0.1, 1, torch.tensor(3))
    runs = []
    for _ in range(3):
        y = lookup(x, table, slope, wiring, flips)
        runs.append((y.detach(), *torch.autograd.grad(y, (x, table), gradient)))
    assert runs[0][0].t().is_contiguous() and runs[0][1].t().is_contiguous()
    for run in runs[1:]:
        assert all(torch.equal(got, want) for got, want in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs(dtype: torch.dtype) -> None:
    wiring, table, _ = bank(6, dtype=torch.float32)
    slope = efd_table(table)
    x = torch.rand(20, 10).to(dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    y, want = lookup(x, table, slope, wiring), lookup(wide, table, slope, wiring)
    assert y.dtype == dtype
    assert torch.equal(y, want.to(dtype))
    gradients = torch.autograd.grad(y.sum(), (x, table))
    assert [gradient.dtype for gradient in gradients] == [dtype, torch.float32]
    for got, exact in zip(gradients, torch.autograd.grad(want.sum(), (wide, table)), strict=True):
        assert torch.equal(got, exact.to(got.dtype))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_takes_bits(dtype: torch.dtype) -> None:
    wiring, table, _ = bank(6, dtype=torch.float32)
    bits = torch.rand(20, 10) < 0.5
    y = lookup(bits.to(dtype), table, wiring=wiring)
    assert y.dtype == torch.float32
    assert torch.equal(y, lookup(bits.float(), table, wiring=wiring))


def test_saves_only_addresses_for_backward() -> None:
    wiring, table, slope = bank(6, 50, dtype=torch.float32)
    x = torch.rand(32, 10, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lookup(x, table, slope, wiring, Flips(0.1, 1, torch.tensor(0)))
    given = {table.data_ptr(), slope.data_ptr()} | {part.data_ptr() for part in wiring.inverse}
    made = [tensor for tensor in saved if tensor.data_ptr() not in given]
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in made] == [(torch.uint8, (50, 32))]


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_binary_gives_the_sign_and_the_gradient_of_the_entry(
    monkeypatch: pytest.MonkeyPatch, kernels: str, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("DIFFLUT_LAB_KERNELS", kernels)
    wiring, weight, slope = bank(4, 30, dtype=torch.float32)
    table = (weight.detach() - 0.5).to(dtype).requires_grad_()
    x = torch.rand(37, 10, requires_grad=True)
    y = lookup(x, table, slope, wiring, binary=True)
    entries = lookup(x, table, slope, wiring)
    assert torch.equal(y, (entries >= 0).to(y.dtype)) and 0 < y.mean() < 1
    gradient = torch.randn(37, 30)
    # a change of the table in place does not matter to the backward
    with torch.no_grad():
        table.clamp_(-0.1, 0.1)
    for got, want in zip(
        torch.autograd.grad(y, (x, table), gradient), torch.autograd.grad(entries, (x, table), gradient), strict=True
    ):
        assert torch.equal(got, want)


def test_empty_batch() -> None:
    wiring, table, slope = bank(6, dtype=torch.float32)
    x = torch.rand(0, 10, requires_grad=True)
    y = lookup(x, table, slope, wiring)
    x_gradient, table_gradient = torch.autograd.grad(y.sum(), (x, table))
    assert y.shape == (0, 5) and x_gradient.shape == x.shape
    assert torch.equal(table_gradient, torch.zeros(5, 64))


@pytest.mark.parametrize("wired", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
def test_opcheck(wired: bool, flipped: bool) -> None:
    n = 9 if flipped else 3
    wiring, table, slope = bank(n, dtype=torch.float32)
    x = torch.rand(9, 10 if wired else 5 * n, requires_grad=True)
    wires = (wiring.indices, True, *wiring.inverse) if wired else (None, False, None, None)
    arguments = (x, table, slope, *wires, torch.tensor(2) if flipped else None, 6000, 5, 1, 3)
    torch.library.opcheck(OP, arguments)
    address = OP(*arguments)[1]
    inverse = wires[2:]
    torch.library.opcheck(
        BACKWARD, (torch.randn(9, 5), address, slope, *inverse, x.shape[1], 2**n, torch.float32, True, not flipped)
    )


def test_compiles_into_one_graph() -> None:
    wiring, table, _ = bank(4, dtype=torch.float32)
    x = torch.rand(9, 10, requires_grad=True)

    def run(x: Tensor, table: Tensor, step: Tensor) -> Tensor:
        y = lookup(x * 0.9, table, efd_table(table), wiring, Flips(0.3, 5, step))
        step.add_(1)
        return y.square()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for start in range(2):
        steps = [torch.tensor(start), torch.tensor(start)]
        y, want = compiled(x, table, steps[0]), run(x, table, steps[1])
        assert torch.equal(y, want)
        assert y.stride() == want.stride()
        for got, exact in zip(
            torch.autograd.grad(y.sum(), (x, table)), torch.autograd.grad(want.sum(), (x, table)), strict=True
        ):
            assert torch.equal(got, exact)


def test_refuses_a_gradient_table_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="gradient: must have shape"):
        lookup(torch.rand(3, 4), torch.rand(2, 4), torch.rand(2, 3, 4))
    with pytest.raises(ValueError, match="x: must have 4 inputs"):
        lookup(torch.rand(3, 5), torch.rand(2, 4))
