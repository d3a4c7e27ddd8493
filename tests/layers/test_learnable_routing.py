from __future__ import annotations

import pytest
import torch

from difflut_lab import REGISTRY, schema
from difflut_lab.errors import ConfigError
from difflut_lab.layers import LearnableRouting
from difflut_lab.layers.learnable_routing import draw_candidates
from difflut_lab.seeding import generator


@pytest.mark.parametrize("shape", [(10, 3), (10, 10), (50, 1), (300, 40)])
def test_candidates_are_distinct_and_unbiased(shape: tuple[int, int]) -> None:
    inputs, count = shape
    drawn = draw_candidates(inputs, (200, 5), count, generator(1))
    assert drawn.dtype == torch.int32 and drawn.shape == (200, 5, count)
    assert (drawn[..., 1:] > drawn[..., :-1]).all()
    used = torch.bincount(drawn.flatten(), minlength=inputs).float()
    p = count / inputs
    assert len(used) == inputs
    assert (used - 1000 * p).abs().max() <= 5 * (1000 * p * (1 - p)) ** 0.5


def test_candidates_do_not_depend_on_how_many_slots_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("difflut_lab.layers.learnable_routing._CHUNK", 100)
    drawn = draw_candidates(30, (7, 3), 4, generator(1))
    assert drawn.shape == (7, 3, 4)
    assert (drawn[..., 1:] > drawn[..., :-1]).all() and drawn.max() < 30


@pytest.mark.parametrize("candidates", [None, 8, 40, 99])
def test_options(candidates: int | None) -> None:
    layer = LearnableRouting(40, 10, n=3, candidates=candidates)
    if candidates == 8:
        assert layer.candidates is not None and layer.candidates.shape == (10, 3, 8)
        assert layer.scores.shape == (10, 3, 8)
    else:
        assert layer.candidates is None and layer.scores.shape == (10, 3, 40)
    large = LearnableRouting(40, 500, n=6).scores
    assert abs(large.std() - 0.01) < 1e-4 and abs(large.mean()) < 1e-4
    for option, value in (("candidates", 0), ("tau", 0.0)):
        with pytest.raises(ConfigError, match=rf"^layer\.{option}={value}: "):
            schema.validate_part("layer", {"name": "learnable_routing", option: value}, "layer")


@pytest.mark.parametrize("candidates", [None, 8])
def test_wiring_is_the_best_candidate_lowest_on_ties(candidates: int | None) -> None:
    layer = LearnableRouting(40, 10, n=3, candidates=candidates)
    wiring = layer.wiring()
    for node in range(10):
        for slot in range(3):
            best = int(layer.scores[node, slot].argmax())
            wanted = best if layer.candidates is None else int(layer.candidates[node, slot, best])
            assert wiring[node, slot] == wanted
    with torch.no_grad():
        layer.scores.zero_()
    lowest = 0 if layer.candidates is None else layer.candidates[..., 0]
    assert (layer.wiring() == lowest).all()


@pytest.mark.parametrize("candidates", [None, 8])
@pytest.mark.parametrize("node", REGISTRY.names("node"))
def test_forward_is_hard_in_training(node: str, candidates: int | None) -> None:
    layer = LearnableRouting(40, 10, node, 2, candidates=candidates)
    x = torch.rand(20, 40)
    y = layer(x)
    assert torch.equal(layer.nodes(x[:, layer.wiring()]), y)
    assert not layer.fixed_wiring and layer.eval().fixed_wiring


@pytest.mark.parametrize("candidates", [None, 8])
def test_gradients(candidates: int | None) -> None:
    """dL/dscores[j, l, c] = sum_b g[b, j, l] (2 x[b, candidate] - 1); dL/dx spreads g by softmax(scores / tau)."""
    layer = LearnableRouting(40, 10, n=3, candidates=candidates, tau=0.02)
    x = torch.rand(20, 40, requires_grad=True)
    g = torch.randn(20, 10, 3)
    got_x, got_scores = torch.autograd.grad(layer.route(x), [x, layer.scores], g)
    pool = layer.candidates
    if pool is None:
        pool = torch.arange(40).expand(10, 3, 40)
    values = x.detach()[:, pool.long()]
    torch.testing.assert_close(got_scores, (g.unsqueeze(-1) * (2 * values - 1)).sum(0), rtol=1e-4, atol=1e-5)
    spread = g.unsqueeze(-1) * (layer.scores.detach() / 0.02).softmax(-1)
    wanted_x = torch.zeros(20, 40).index_add_(1, pool.flatten().long(), spread.flatten(1))
    torch.testing.assert_close(got_x, wanted_x, rtol=1e-4, atol=1e-5)


def test_the_choice_follows_the_scores_in_eval() -> None:
    layer = LearnableRouting(40, 10, "dwn", 3, candidates=8).eval()
    x = torch.randint(0, 2, (50, 40)).float()
    before = layer(x)
    # an update that leaves no trace in the version counter, as weight averaging makes
    layer.scores.data = -layer.scores.data
    assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), layer.nodes(x[:, layer.wiring()]))


def test_learns_to_find_an_input() -> None:
    layer = LearnableRouting(12, 4, "dwn", 1, candidates=None, node_kwargs={"initializer": "residual"})
    optimizer = torch.optim.Adam([layer.scores], lr=0.01)
    for _ in range(60):
        x = torch.randint(0, 2, (64, 12)).float()
        loss = (layer(x) - x[:, 5:6]).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (layer.wiring() == 5).all()
