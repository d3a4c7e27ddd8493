from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from difflut_lab import REGISTRY
from difflut_lab.errors import CheckpointError, ConfigError
from difflut_lab.layers.learnable_routing import LearnableRouting
from difflut_lab.nodes.probabilistic import ProbabilisticNodes
from difflut_lab.training.checkpoint import KEY, load_network, read
from difflut_lab.training.compose import resolve
from difflut_lab.training.evaluate import evaluate

# tau of the routing moves the gradients of the inputs, which the layer below sees
LEARNED = ["layer=learnable_routing", "layer.candidates=8", "model.widths=[30,20]"]
TAU = ["+schedule@schedules.layer.tau=exponential", "layer.tau=1.0", "schedules.layer.tau.end=0.01"]
FORMULAS = {
    "linear": lambda start, end, p: (1 - p) * start + p * end,
    "cosine": lambda start, end, p: end + 0.5 * (start - end) * (1 + math.cos(math.pi * p)),
    "exponential": lambda start, end, p: math.exp((1 - p) * math.log(start) + p * math.log(end)),
}


def history(directory: Path) -> list[dict[str, str]]:
    with open(directory / "history.csv") as file:
        return list(csv.DictReader(file))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return read(directory / "checkpoints" / "last.ckpt")["state_dict"]


def test_every_schedule_has_a_formula_here():
    assert set(FORMULAS) == set(REGISTRY.names("schedule"))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("start", "end"), [(10.0, 3.0), (0.001, 2.0)])
def test_values_follow_the_formula_and_stay_at_the_end(name, start, end):
    schedule = REGISTRY.build("schedule", name, start=start, end=end, epochs=5)
    values = [schedule.value(epoch, start=7.0, epochs=99) for epoch in range(8)]
    expected = [FORMULAS[name](start, end, min(epoch / 4, 1)) for epoch in range(8)]
    assert values == pytest.approx(expected, rel=1e-12)
    assert values[0] == pytest.approx(start)
    assert values[4:] == [end] * 4


def test_what_is_not_said_is_the_parts_own_value_and_the_whole_training():
    schedule = REGISTRY.build("schedule", "linear", end=1.0)
    assert [schedule.value(epoch, start=5.0, epochs=3) for epoch in range(3)] == [5.0, 3.0, 1.0]
    assert schedule.value(0, start=5.0, epochs=1) == 1.0, "one epoch is the last"


def test_epochs_train_with_their_values_and_log_them(train, monkeypatch):
    seen: list[float] = []
    original = LearnableRouting.route

    def route(self, x):
        if self.training:
            seen.append(self.tau)
        return original(self, x)

    monkeypatch.setattr(LearnableRouting, "route", route)
    directory = train(*LEARNED, *TAU, "trainer.max_epochs=3", "batch_size=1024")
    assert seen == pytest.approx([value for value in (1.0, 0.1, 0.01) for _ in range(4)]), "two layers, two batches"
    logged = [float(row["schedule/layer.tau"]) for row in history(directory)]
    assert logged == pytest.approx([1.0, 0.1, 0.01])


@pytest.mark.parametrize("head", ["group_sum", "linear"])
def test_the_temperature_of_every_head_follows(train, head):
    directory = train(f"head={head}", "+schedule@schedules.head.tau=linear", "head.tau=9", "schedules.head.tau.end=5")
    logged = [float(row["schedule/head.tau"]) for row in history(directory)]
    assert logged == pytest.approx([9 - 4 * epoch / (len(logged) - 1) for epoch in range(len(logged))])


def test_the_learned_routing_depends_on_it(train):
    constant = weights(train(*LEARNED, "layer.tau=1.0", name="constant"))
    moved = weights(train(*LEARNED, *TAU, name="moved"))
    assert any(not torch.equal(constant[name], moved[name]) for name in constant)


def test_continuing_equals_not_having_stopped(train):
    words = [*LEARNED, *TAU, "schedules.layer.tau.epochs=4", "scheduler=none"]
    whole = train(*words, "trainer.max_epochs=4", name="whole")
    half = train(*words, "trainer.max_epochs=2", name="half")
    last = half / "checkpoints" / "last.ckpt"
    rest = train(*words, "trainer.max_epochs=4", f"ckpt={last}", name="rest")
    expected, found = weights(whole), weights(rest)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    logged = [float(row["schedule/layer.tau"]) for row in history(half) + history(rest)]
    assert logged == [float(row["schedule/layer.tau"]) for row in history(whole)]
    with pytest.raises(CheckpointError, match=r"other settings: schedules\.layer\.tau\.end is 0\.01 there, 0\.1 here"):
        train(*words, "trainer.max_epochs=4", "schedules.layer.tau.end=0.1", f"ckpt={last}", name="other")


def test_a_longer_training_with_another_course_is_refused(train):
    words = [*LEARNED, *TAU, "scheduler=none"]
    last = train(*words, "trainer.max_epochs=1", name="short") / "checkpoints" / "last.ckpt"
    with pytest.raises(CheckpointError, match=r"schedules\.layer\.tau\.epochs is 1 there, 4 here"):
        train(*words, "trainer.max_epochs=4", f"ckpt={last}", name="long")


def test_the_best_checkpoint_evaluates_with_the_values_of_its_epoch(train):
    # a temperature that rises blurs the soft tables, and an optimizer that stands still keeps the first epoch the best
    words = [
        "node=probabilistic",
        "optimizer=sgd",
        "optimizer.lr=1e-12",
        "optimizer.momentum=0",
        "eval_batch_size=2000",
    ]
    words += ["+schedules.node.temperature={name: linear, start: 0.01, end: 50}", "trainer.max_epochs=3"]
    directory = train(*words)
    best, last = directory / "checkpoints" / "best.ckpt", directory / "checkpoints" / "last.ckpt"
    assert read(best)[KEY]["scheduled"] == {"node.temperature": pytest.approx(0.01)}
    assert read(last)[KEY]["scheduled"] == {"node.temperature": 50.0}
    banks = [bank for bank in load_network(best).modules() if isinstance(bank, ProbabilisticNodes)]
    assert [bank.temperature for bank in banks] == [pytest.approx(0.01)] * 2
    results, metrics = evaluate(best), json.loads((directory / "metrics.json").read_text())
    assert results == pytest.approx({name: metrics[name] for name in results}, abs=1e-6)
    assert evaluate(last)["test/acc"] == results["test/acc"], "the tables are the same"
    assert evaluate(last)["test/acc_soft"] != results["test/acc_soft"], "the relaxation is not"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+schedules.node.temperature=linear"], "schedules.node.temperature.end: must be given."),
        (
            ["+schedules.node.temperature={name: linar, end: 1}"],
            "Unknown schedule 'linar' (schedules.node.temperature.name=linar). Did you mean 'linear'?",
        ),
        (
            ["+schedules.node.temperature={name: linear, end: -1}"],
            "schedules.node.temperature.end=-1: must be at least 0.",
        ),
        (
            ["+schedules.node.temperature={name: linear, end: 1, begin: 2}"],
            "Unknown key 'schedules.node.temperature.begin' (value 2).",
        ),
        (
            ["+schedules.node.temperature={name: linear, end: 1, epochs: 0}"],
            "schedules.node.temperature.epochs=0: must be greater than or equal to 1.",
        ),
        (["+schedules.node=linear"], "schedules.node='linear': must be a mapping of values to schedules."),
        (["schedules=linear"], "schedules='linear': must be a mapping"),
    ],
)
def test_mistakes_are_told_before_data_is_read(composed, words, message):
    with pytest.raises(ConfigError) as error:
        resolve(composed(*words), words)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_what_no_part_of_the_network_has_is_told_with_what_there_is(train, tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"Unknown key 'schedules\.layer\.taw': .* Did you mean 'schedules\.layer\.tau'\? It has: .*layer\.tau",
    ):
        train(*LEARNED, "+schedules.layer.taw={name: linear, end: 1}")
    with pytest.raises(ConfigError, match=r"Unknown key 'schedules\.layer\.tau': no part of this network"):
        train("+schedules.layer.tau={name: linear, end: 1}")  # random wiring
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_parts_that_start_at_several_values_need_a_start(train):
    words = [*LEARNED, "+model.per_layer.1.layer.tau=0.5", "+schedules.layer.tau={name: linear, end: 1}"]
    with pytest.raises(ConfigError, match=r"schedules\.layer\.tau\.start: must be given, .* start at 0\.001, 0\.5\."):
        train(*words)


def test_a_network_becomes_ternary_step_by_step(train, monkeypatch):
    from difflut_lab.ternary.base import TernaryLayer

    seen: list[float] = []
    effective = TernaryLayer.effective_weight

    def spy(layer: TernaryLayer) -> torch.Tensor:
        if layer.training and not layer.is_float:
            seen.append(layer.quantizer.blend)
        return effective(layer)

    monkeypatch.setattr(TernaryLayer, "effective_weight", spy)
    blend = "schedules.quantizer.blend"
    words = [f"+schedule@{blend}=linear", f"{blend}.start=0", f"{blend}.end=1", "trainer.max_epochs=3"]
    train("model=ternary_mlp", "model.widths=[12,12]", *words)
    assert sorted(set(seen)) == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model=ternary_mlp", "+schedule@schedules.quantizer.blend=linear", "schedules.quantizer.blend.end=1.5"],
            r"schedules\.quantizer\.blend\.end=1\.5: must be at least 0 and at most 1\.",
        ),
        (
            ["+schedule@schedules.head.tau=linear", "schedules.head.tau.end=0"],
            r"schedules\.head\.tau\.end=0\.0: must be greater than 0\.",
        ),
        (
            [
                "model=ternary_mlp",
                "quantizer.blend=0",
                "+schedule@schedules.quantizer.blend=exponential",
                "schedules.quantizer.blend.end=1",
            ],
            r"exponential: a schedule cannot start at 0",
        ),
    ],
    ids=["more than all", "no temperature", "no factor"],
)
def test_values_that_a_part_may_not_have_are_refused(train, words, message):
    with pytest.raises(ConfigError, match=message):
        train(*words)
