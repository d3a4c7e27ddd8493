"""route against its definition, with all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from difflut_lab.ops import Wiring, route
from difflut_lab.ops.route.reference import _gathered_product, _sampled_product

OP = torch.ops.difflut_lab.route.default
BACKWARD = torch.ops.difflut_lab.route_backward.default


def expected(
    x: Tensor, scores: Tensor, candidates: Tensor | None, gradient: Tensor, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of x and the scores, slot by slot."""
    num_nodes, n, count = scores.shape
    y, x_gradient, score_gradient = torch.zeros_like(gradient), torch.zeros_like(x), torch.zeros_like(scores)
    for j in range(num_nodes):
        for k in range(n):
            inputs = torch.arange(count) if candidates is None else candidates[j, k].long()
            best = max(range(count), key=lambda c: (float(scores[j, k, c]), -c))
            g = gradient[:, j * n + k]
            y[:, j * n + k] = x[:, inputs[best]]
            score_gradient[j, k] = (2 * x[:, inputs] - 1).t() @ g
            weights = torch.softmax(scores[j, k] / tau, dim=0)
            for c in range(count):
                x_gradient[:, inputs[c]] += weights[c] * g
    return y, x_gradient, score_gradient


def bank(count: int | None, num_nodes: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None]:
    """Scores with ties, and candidates among 10 inputs with repetitions."""
    scores = (torch.randn(num_nodes, 4, count or 10, dtype=dtype) * 0.003).mul(1000).round().div(1000)
    if count is None:
        return scores.requires_grad_(), None
    return scores.requires_grad_(), torch.randint(0, 10, (num_nodes, 4, count), dtype=torch.int32)


@pytest.mark.parametrize("count", [None, 1, 3, 7])
@pytest.mark.parametrize("tau", [0.001, 0.5])
def test_equals_the_definition(count: int | None, tau: float) -> None:
    scores, candidates = bank(count)
    x = torch.rand(9, 10, dtype=torch.float64, requires_grad=True)
    y = route(x, scores, candidates, tau)
    gradient = torch.randn_like(y)
    got = (y.detach(), *torch.autograd.grad(y, (x, scores), gradient))
    for result, want in zip(got, expected(x.detach(), scores.detach(), candidates, gradient, tau), strict=True):
        torch.testing.assert_close(result, want)


@pytest.mark.parametrize("batch", [1, 3, 127])
@pytest.mark.parametrize("num_nodes", [1, 3, 31])
@pytest.mark.parametrize("count", [None, 5])
def test_odd_sizes_in_float32(batch: int, num_nodes: int, count: int | None) -> None:
    scores, candidates = bank(count, num_nodes, torch.float32)
    x = torch.rand(batch, 10, requires_grad=True)
    y = route(x, scores, candidates)
    gradient = torch.randn_like(y)
    got = (y.detach(), *torch.autograd.grad(y, (x, scores), gradient))
    for result, want in zip(got, expected(x.detach(), scores.detach(), candidates, gradient, 0.001), strict=True):
        torch.testing.assert_close(result, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 500, 1 << 20])
def test_both_products_agree(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("difflut_lab.ops.shapes.CPU_CHUNK", chunk)
    candidates = torch.randint(0, 10, (20, 6), dtype=torch.int32)
    slots, signs = torch.randn(20, 9, dtype=torch.float64), torch.randn(10, 9, dtype=torch.float64)
    torch.testing.assert_close(_gathered_product(slots, signs, candidates), _sampled_product(slots, signs, candidates))


def test_ties_go_to_the_first() -> None:
    scores = torch.zeros(1, 2, 3)
    candidates = torch.tensor([[[4, 1, 2], [3, 3, 0]]], dtype=torch.int32)
    x = torch.arange(5.0).expand(2, 5)
    assert route(x, scores, candidates).tolist() == [[4, 3], [4, 3]]


def test_a_wiring_of_candidates_gives_the_same() -> None:
    scores, candidates = bank(6)
    assert candidates is not None
    wiring = Wiring(candidates.flatten(0, 1), 10)
    x = torch.rand(9, 10, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(9, 20, dtype=torch.float64)
    results = [
        torch.autograd.grad(route(x, scores, given, 0.01), (x, scores), gradient) for given in (candidates, wiring)
    ]
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))


@pytest.mark.parametrize("count", [None, 6])
def test_computes_only_what_is_needed(count: int | None) -> None:
    scores, candidates = bank(count)
    x = torch.rand(9, 10, dtype=torch.float64, requires_grad=True)
    both = torch.autograd.grad(route(x, scores, candidates).sum(), (x, scores))
    (x_alone,) = torch.autograd.grad(route(x, scores.detach(), candidates).sum(), x)
    (scores_alone,) = torch.autograd.grad(route(x.detach(), scores, candidates).sum(), scores)
    assert torch.equal(x_alone, both[0]) and torch.equal(scores_alone, both[1])
    assert not route(x.detach(), scores.detach(), candidates).requires_grad


@pytest.mark.parametrize("count", [None, 6])
def test_any_layout(count: int | None) -> None:
    scores, candidates = bank(count, dtype=torch.float32)
    values, gradient = torch.rand(9, 10), torch.randn(9, 20)
    wide = torch.zeros(9, 30)
    wide[:, ::3] = values
    results = []
    for x in (values, values.t().contiguous().t(), wide[:, ::3]):
        for upstream in (gradient, gradient.t().contiguous().t()):
            leaf = x.detach().requires_grad_()
            y = route(leaf, scores, candidates)
            results.append((y.detach(), *torch.autograd.grad(y, (leaf, scores), upstream)))
    assert results[0][0].t().is_contiguous() and results[0][1].t().is_contiguous()
    for result in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(result, results[0], strict=True))
    # an expanded gradient, as a sum gives it
    leaf = values.clone().requires_grad_()
    expanded = torch.autograd.grad(route(leaf, scores, candidates).sum(), (leaf, scores))
    ones = torch.autograd.grad(route(leaf, scores, candidates), (leaf, scores), torch.ones(9, 20))
    assert all(torch.equal(got, want) for got, want in zip(expanded, ones, strict=True))


def test_is_deterministic() -> None:
    scores = torch.randn(300, 6, 16, requires_grad=True)
    candidates = torch.randint(0, 50, (300, 6, 16), dtype=torch.int32)
    x = torch.rand(64, 50, requires_grad=True)
    gradient = torch.randn(64, 1800)
    runs = [torch.autograd.grad(route(x, scores, candidates, 1.0), (x, scores), gradient) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(got, want) for got, want in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("count", [None, 6])
def test_computes_in_float32(count: int | None) -> None:
    scores, candidates = bank(count, dtype=torch.float32)
    x = torch.rand(20, 10).bfloat16().requires_grad_()
    wide = x.detach().float().requires_grad_()
    gradient = torch.randn(20, 20).bfloat16()
    y, want = route(x, scores, candidates), route(wide, scores, candidates)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.float(), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = torch.autograd.grad(y, (x, scores), gradient)
    for got, exact in zip(gradients, torch.autograd.grad(want, (wide, scores), gradient.float()), strict=True):
        assert torch.equal(got, exact.to(got.dtype))


def test_takes_bits() -> None:
    scores, candidates = bank(6, dtype=torch.float32)
    bits = torch.rand(20, 10) < 0.5
    y, want = route(bits, scores, candidates), route(bits.float(), scores, candidates)
    assert y.dtype == torch.float32
    assert torch.equal(y, want)
    assert torch.equal(torch.autograd.grad(y.sum(), scores)[0], torch.autograd.grad(want.sum(), scores)[0])


@pytest.mark.parametrize("count", [None, 6])
def test_empty_batch(count: int | None) -> None:
    scores, candidates = bank(count, dtype=torch.float32)
    x = torch.rand(0, 10, requires_grad=True)
    y = route(x, scores, candidates)
    x_gradient, score_gradient = torch.autograd.grad(y.sum(), (x, scores))
    assert y.shape == (0, 20) and x_gradient.shape == x.shape
    assert torch.equal(score_gradient, torch.zeros_like(scores))


@pytest.mark.parametrize("count", [None, 6])
def test_opcheck(count: int | None) -> None:
    scores, candidates = bank(count, dtype=torch.float32)
    x = torch.rand(9, 10, requires_grad=True)
    inverse = (None, None) if candidates is None else Wiring(candidates.flatten(0, 1), 10).inverse
    torch.library.opcheck(OP, (x, scores, candidates, *inverse, 0.001))
    arguments = (torch.randn(9, 20), x.detach(), scores.detach(), candidates, *inverse, 0.001)
    torch.library.opcheck(BACKWARD, (*arguments, True, True))
    torch.library.opcheck(BACKWARD, (*arguments, False, True))


@pytest.mark.parametrize("count", [None, 6])
def test_compiles_into_one_graph(count: int | None) -> None:
    scores, candidates = bank(count, dtype=torch.float32)
    x = torch.rand(9, 10, requires_grad=True)

    def run(x: Tensor, scores: Tensor) -> Tensor:
        return route(x * 0.9, scores, candidates).square()

    y, want = torch.compile(run, fullgraph=True, backend="aot_eager")(x, scores), run(x, scores)
    assert torch.equal(y, want) and y.stride() == want.stride()
    for got, exact in zip(
        torch.autograd.grad(y.sum(), (x, scores)), torch.autograd.grad(want.sum(), (x, scores)), strict=True
    ):
        assert torch.equal(got, exact)


def test_refuses_shapes_that_do_not_fit() -> None:
    x, scores = torch.rand(3, 10), torch.rand(2, 4, 6)
    with pytest.raises(ValueError, match=r"scores: must have shape \(2, 4, 10\)"):
        route(x, scores)
    with pytest.raises(ValueError, match=r"scores: must have shape \(2, 4, 5\)"):
        route(x, scores, torch.zeros(2, 4, 5, dtype=torch.int32))
    with pytest.raises(ValueError, match="10 inputs"):
        route(x, scores, Wiring(torch.zeros(8, 6, dtype=torch.int32), 9))
    with pytest.raises(ValueError, match=r"\(N, n, k\)"):
        route(x, scores[0])


def test_refuses_candidates_out_of_range() -> None:
    scores = torch.zeros(2, 4, 6, requires_grad=True)
    candidates = torch.zeros(2, 4, 6, dtype=torch.int32)
    candidates[1, 2, 3] = 10
    y = route(torch.rand(3, 10), scores, candidates)
    with pytest.raises(IndexError, match="found 0 to 10"):
        y.sum().backward()
