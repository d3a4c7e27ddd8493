"""What makes trainings better beside the network: augmentations, smoothed labels, averaged weights, teachers."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn import functional

from difflut_lab.data import DataSet
from difflut_lab.data.digits import Digits
from difflut_lab.errors import CheckpointError, ConfigError
from difflut_lab.registry import REGISTRY
from difflut_lab.training.checkpoint import KEY, load_network, read
from difflut_lab.training.compose import build_model, resolve
from difflut_lab.training.distillation import Teacher
from difflut_lab.training.module import Classifier
from difflut_lab.training.network import Network

Train = Callable[..., Path]
Compose = Callable[..., DictConfig]
MLP = ["model=ternary_mlp", "model.widths=[24,16]"]
MIXED = ["+augmentation@augmentations.mixup=mixup", "augmentations.mixup.alpha=1"]
AUGMENTATIONS = [
    name
    for name in REGISTRY.names("augmentation")
    if REGISTRY.get("augmentation", name).__module__.startswith("difflut_lab.")
]


def history(directory: Path) -> list[dict[str, str]]:
    with open(directory / "history.csv") as file:
        return list(csv.DictReader(file))


def best(directory: Path) -> Path:
    return directory / "checkpoints" / "best.ckpt"


@pytest.fixture
def teacher(train: Train) -> Path:
    return best(train(*MLP, "quantizer=none", "trainer.max_epochs=1", name="teacher"))


def classifier(composed: Compose, *words: str, teacher: Teacher | None = None) -> Classifier:
    """What a run would train, in eval mode, so that two steps see the same network."""
    config = resolve(composed(*MLP, *words), [])
    network = Network(build_model(config, (1, 8, 8), 10), [0.0], [16.0], [str(digit) for digit in range(10)])
    module = Classifier(network.eval(), config, {}, teacher)
    monitored: Any = module
    monitored._check_finite = lambda: None  # it asks the trainer for the epoch
    return module


def batch(shares: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.randint(0, 17, (32, 1, 8, 8)).to(torch.uint8), torch.arange(32) % 10
    return x, torch.rand(32, 10).softmax(dim=1) if shares else y


@pytest.mark.parametrize("shares", [False, True])
def test_labels_are_smoothed_in_training_alone(composed: Compose, shares: bool) -> None:
    plain, smoothed = classifier(composed), classifier(composed, "label_smoothing=0.2")
    x, y = batch(shares)
    log = plain(x).log_softmax(dim=1)
    target = y if shares else functional.one_hot(y, 10).float()
    for module, share in ((plain, 0.0), (smoothed, 0.2)):
        expected = -((target * (1 - share) + share / 10) * log).sum(dim=1).mean()
        torch.testing.assert_close(module.training_step((x, y), 1), expected)
    if not shares:
        for module in (plain, smoothed):
            module._start_evaluation()
            module.validation_step((x, y), 0)
        assert torch.equal(plain._eval_loss, smoothed._eval_loss)


@pytest.mark.parametrize("shares", [False, True])
def test_accuracy_in_training_counts_the_largest_class(composed: Compose, shares: bool) -> None:
    module = classifier(composed)
    x, y = batch(shares)
    module.training_step((x, y), 1)
    classes = y.argmax(dim=1) if shares else y
    assert int(module._correct) == int((module(x).argmax(dim=1) == classes).sum())


def test_the_loss_with_a_teacher_is_the_formula(composed: Compose, teacher: Path) -> None:
    words = [f"distillation.ckpt={teacher}", "distillation.weight=0.3", "distillation.temperature=2"]
    module = classifier(composed, *words, "label_smoothing=0.1", teacher=Teacher(teacher, 2.0))
    x, y = batch(shares=True)
    scores, wanted = module(x), load_network(teacher)(x)
    smoothed = 0.9 * y + 0.01
    own = -(smoothed * scores.log_softmax(dim=1)).sum(dim=1).mean()
    p, log_q = (wanted / 2).softmax(dim=1), (scores / 2).log_softmax(dim=1)
    divergence = (p * (p.log() - log_q)).sum(dim=1).mean()
    torch.testing.assert_close(module.training_step((x, y), 1), 0.7 * own + 0.3 * 4 * divergence)
    torch.testing.assert_close(module._distillation_sum, 32 * 4 * divergence.detach())
    torch.testing.assert_close(module._loss_sum, 32 * own.detach())


def test_a_teacher_is_no_part_of_its_student(train: Train, teacher: Path) -> None:
    words = [*MLP, "layer_config.flip_probability=0.05"]
    plain = train(*words, name="plain")
    taught = train(*words, f"distillation.ckpt={teacher}", name="taught")
    states = [read(path / "checkpoints" / "last.ckpt") for path in (plain, taught)]
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()
    assert len(states[0]["optimizer_states"][0]["state"]) == len(states[1]["optimizer_states"][0]["state"])
    assert "train/distillation" not in history(plain)[0]
    assert all(float(row["train/distillation"]) > 0 for row in history(taught))
    assert OmegaConf.load(taught / "config.yaml").distillation.ckpt == str(teacher)
    assert states[1][KEY]["config"]["distillation"]["ckpt"] == str(teacher)
    assert load_network(best(taught)).training is False
    # a weight of 0 learns from labels alone, from the same random numbers
    unheard = train(*words, f"distillation.ckpt={teacher}", "distillation.weight=0", name="unheard")
    state = read(unheard / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in states[0]["state_dict"].items())


def test_a_network_that_is_its_own_teacher_has_nothing_to_learn(train: Train, teacher: Path) -> None:
    network = load_network(teacher)
    x, _ = batch(shares=False)
    loss = Teacher(teacher, 4.0).loss(x, network(x))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)


def test_teachers_that_do_not_fit_are_refused(train: Train, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^distillation\.ckpt=nowhere\.ckpt: there is no such file\.$"):
        train(*MLP, "distillation.ckpt=nowhere.ckpt", name="nowhere")
    assert not list((tmp_path / "nowhere").iterdir())
    data: DataSet = Digits().load()
    fitting = Teacher(teacher, 1.0)
    fitting.check(data)
    content = read(teacher)
    content[KEY]["class_names"] = list("abcdefghij")
    torch.save(content, tmp_path / "letters.ckpt")
    with pytest.raises(CheckpointError, match=r"letters.ckpt: was trained on the classes \['a', .*the data has \['0'"):
        train(*MLP, f"distillation.ckpt={tmp_path}/letters.ckpt", name="letters")
    content = read(teacher)
    content[KEY]["input_shape"] = [1, 4, 16]
    torch.save(content, tmp_path / "wide.ckpt")
    with pytest.raises(CheckpointError, match=r"samples of shape \(1, 4, 16\), the data has \(1, 8, 8\)"):
        train(*MLP, f"distillation.ckpt={tmp_path}/wide.ckpt", name="wide")


def test_all_at_once_trains_and_continues(train: Train, teacher: Path) -> None:
    words = [*MLP, *MIXED, "+augmentation@augmentations.cutmix=cutmix", "augmentations.cutmix.probability=0.5"]
    words += ["label_smoothing=0.1", f"distillation.ckpt={teacher}", "ema_decay=0.9", "scheduler=none"]
    words += ["quantizer=ttq", "trainer.gradient_clip_val=1", "optimizer.lr=0.01"]
    whole = train(*words, "trainer.max_epochs=4", name="whole")
    half = train(*words, "trainer.max_epochs=2", name="half")
    last = half / "checkpoints" / "last.ckpt"
    rest = train(*words, "trainer.max_epochs=4", f"ckpt={last}", name="rest")
    states = [read(path / "checkpoints" / "last.ckpt")["state_dict"] for path in (whole, rest)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    rows = history(whole)
    assert all(torch.isfinite(torch.tensor(float(value))) for row in rows for value in row.values())
    assert 0 < float(rows[-1]["train/acc"]) <= 1
    assert json.loads((whole / "metrics.json").read_text())["test/acc"] > 0.3
    for word, message in (
        ("+trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches is None there, 2 here"),
        ("label_smoothing=0.2", "label_smoothing is 0.1 there, 0.2 here"),
        ("ema_decay=0.95", "ema_decay is 0.9 there, 0.95 here"),
        ("distillation.weight=0.9", "distillation.weight is 0.5 there, 0.9 here"),
        ("quantizer.threshold=0.1", "another network: quantizer.threshold is 0.05 there, 0.1 here"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(*words, word, "trainer.max_epochs=4", f"ckpt={last}", name="other")


def test_checkpoints_without_these_settings_are_continued(train: Train, tmp_path: Path) -> None:
    words = [*MLP, "scheduler=none"]
    content = read(train(*words) / "checkpoints" / "last.ckpt")
    for key in ("label_smoothing", "ema_decay", "distillation"):
        del content[KEY]["config"][key]
    torch.save(content, tmp_path / "before.ckpt")
    train(*words, f"ckpt={tmp_path}/before.ckpt", "trainer.max_epochs=3", name="rest")
    with pytest.raises(CheckpointError, match="ema_decay is None there, 0.9 here"):
        train(*words, f"ckpt={tmp_path}/before.ckpt", "ema_decay=0.9", "trainer.max_epochs=3", name="other")


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation_trains_tables_and_ternary_networks(train: Train, name: str) -> None:
    words = [f"+augmentation@augmentations.mine={name}", "fast_dev_run=true"]
    for model in (MLP, ["model=lut_mlp", "model.widths=[20]"]):
        (row,) = history(train(*model, *words, name=model[0]))
        assert torch.isfinite(torch.tensor(float(row["train/loss"])))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["label_smoothing=1"], "label_smoothing=1: must be at least 0 and less than 1."),
        (["label_smoothing=-0.1"], "label_smoothing=-0.1: must be at least 0 and less than 1."),
        (["ema_decay=1"], "ema_decay=1: must be less than 1"),
        (["ema_decay=yes"], "ema_decay=yes: "),
        (["distillation.weight=0.7"], "distillation.weight=0.7: there is no teacher; name one by distillation.ckpt."),
        (["trainer.precision=bf16-true"], "trainer.precision=bf16-true: must be 32-true, 64-true, 16-mixed or bf16-"),
        (["distillation.weight=1.5"], "distillation.weight=1.5: must be at least 0 and at most 1."),
        (["distillation.temperature=0"], "distillation.temperature=0: must be greater than 0."),
        (
            ["+distillation.tau=4"],
            "Unknown key 'distillation.tau' (value 4). Allowed keys: distillation.ckpt, distillation.weight",
        ),
        (["distillation=teacher.ckpt"], "distillation='teacher.ckpt': must be a mapping, such as {ckpt: "),
        ([*MIXED, "augmentations.mixup.alpha=0"], "augmentations.mixup.alpha=0: must be at least 0.01."),
        (
            ["+augmentations.mine.name=mixupp"],
            "Unknown augmentation 'mixupp' (augmentations.mine.name=mixupp). Did you mean 'mixup'?",
        ),
        ([*MIXED, "+augmentations.mixup.num_classes=3"], "Unknown key 'augmentations.mixup.num_classes' (value 3)."),
        (
            ["+augmentation@augmentations.mine=rand_augment", "augmentations.mine.magnitude=31"],
            "augmentations.mine.magnitude=31: must be at least 0 and at most 30.",
        ),
        (
            ["+augmentation@augmentations.mine=random_erasing", "augmentations.mine.fill=nois"],
            "augmentations.mine.fill=nois: must be one of noise, mean. Did you mean 'noise'?",
        ),
    ],
)
def test_bad_settings_are_one_line(composed: Compose, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(composed(*words), words)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
