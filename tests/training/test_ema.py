"""Averaged weights: what they are, where they are used, and that a training that is continued keeps them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from difflut_lab.data.digits import Digits
from difflut_lab.ternary import TernaryBatchNorm, TernaryLayer
from difflut_lab.training.checkpoint import load_network, read
from difflut_lab.training.ema import AveragedWeights
from difflut_lab.training.evaluate import evaluate

Train = Callable[..., Path]
MLP = ["model=ternary_mlp", "model.widths=[24,16]", "optimizer.lr=0.01"]


def state(directory: Path, name: str = "last") -> dict[str, Tensor]:
    content: dict[str, Tensor] = read(directory / "checkpoints" / f"{name}.ckpt")["state_dict"]
    return content


def trained(directory: Path) -> dict[str, Tensor]:
    """The half of a training that the network of its checkpoint does not hold."""
    callback = read(directory / "checkpoints" / "last.ckpt")["callbacks"]["AveragedWeights"]
    assert callback["is_applied"]
    found: dict[str, Tensor] = callback["other"]
    return found


class Tiny(nn.Module):
    """A weight, running statistics and a counter."""

    draw_step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.norm = TernaryBatchNorm(2)
        self.register_buffer("draw_step", torch.zeros((), dtype=torch.int64))


def test_the_average_follows_the_formula_and_counters_are_not_averaged() -> None:
    network, trainer = Tiny(), Mock(global_step=0)
    callback = AveragedWeights(network, decay=0.2)
    callback.on_train_start(trainer, Mock())
    assert network.norm.running_mean is not None
    weight, mean = network.weight.detach().clone(), network.norm.running_mean.clone()
    # a batch that shares its step with the one before changes nothing
    for step in (1, 1, 2, 3):
        with torch.no_grad():
            network.weight.normal_()
            network.norm.running_mean.normal_()
            network.draw_step += 1
        if step != trainer.global_step:
            decay = min(0.2, step / (9 + step))
            weight = decay * weight + (1 - decay) * network.weight.detach()
            mean = decay * mean + (1 - decay) * network.norm.running_mean
        trainer.global_step = step
        callback.on_train_batch_end(trainer, Mock(), None, None, 0)
    own = network.weight.detach().clone()
    with callback.applied():
        torch.testing.assert_close(network.weight.detach(), weight)
        torch.testing.assert_close(network.norm.running_mean, mean)
        assert int(network.draw_step) == 4
    assert torch.equal(network.weight.detach(), own)


@pytest.mark.parametrize(
    "words",
    [
        [*MLP, "quantizer=ttq", "layer_config.flip_probability=0.05"],
        [*MLP, "quantizer=stochastic", "scheduler=step", "scheduler.step_size=1"],
        ["layer=learnable_routing", "model.widths=[40,20]", "scheduler=none"],
    ],
    ids=lambda words: words[-1],
)
def test_continuing_equals_not_having_stopped(train: Train, words: list[str]) -> None:
    words = [*words, "ema_decay=0.9"] + ["scheduler=none"] * (words[0] == MLP[0] and "scheduler=step" not in words)
    whole = train(*words, "trainer.max_epochs=4", name="whole")
    half = train(*words, "trainer.max_epochs=2", name="half")
    rest = train(*words, "trainer.max_epochs=4", f"ckpt={half}/checkpoints/last.ckpt", name="rest")
    for expected, found in ((state(whole), state(rest)), (trained(whole), trained(rest))):
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    results = [json.loads((path / "metrics.json").read_text()) for path in (whole, rest)]
    assert results[0]["test/acc"] == results[1]["test/acc"]
    assert results[0]["val/acc"] == results[1]["val/acc"]


def test_training_itself_does_not_see_the_average(train: Train) -> None:
    plain, averaged = train(*MLP, name="plain"), train(*MLP, "ema_decay=0.9", name="averaged")
    own = state(plain)
    assert all(torch.equal(own[f"network.{name}"], tensor) for name, tensor in trained(averaged).items())
    assert not all(torch.equal(own[name], tensor) for name, tensor in state(averaged).items())
    # codes that are counted are those that are trained
    assert (plain / "health.csv").read_text() == (averaged / "health.csv").read_text()


def test_what_is_validated_saved_and_tested_is_the_average_quantised_anew(train: Train) -> None:
    directory = train(*MLP, "ema_decay=0.99", "data.val_fraction=0.3")
    best = directory / "checkpoints" / "best.ckpt"
    results = json.loads((directory / "metrics.json").read_text())
    assert evaluate(best)["test/acc"] == pytest.approx(results["test/acc"], abs=1e-6)
    layers = [part for part in load_network(best).modules() if isinstance(part, TernaryLayer) and not part.is_float]
    for layer in layers:
        assert torch.isin(layer.quantized().codes, torch.tensor([-1.0, 0.0, 1.0])).all()
        assert len(layer.weight.unique()) > 3, "latent weights are saved, not ternary ones"
    with open(directory / "history.csv") as file:
        last = list(csv.DictReader(file))[-1]
    network = load_network(directory / "checkpoints" / "last.ckpt")
    val = Digits(val_fraction=0.3).load().val
    accuracy = float((network.predict(val.x) == val.y).float().mean())
    assert float(last["val/acc"]) == pytest.approx(accuracy, abs=1e-6)
