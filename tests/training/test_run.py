import csv
import json
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from difflut_lab.data.digits import Digits
from difflut_lab.errors import CheckpointError, ConfigError, TrainingError
from difflut_lab.training.checkpoint import KEY, load_network, read
from difflut_lab.training.evaluate import evaluate


def metrics(directory):
    return json.loads((directory / "metrics.json").read_text())


def test_a_run_leaves_its_whole_experiment_behind(train):
    directory = train("model.widths=[40,25]", "data.val_fraction=0.2")
    names = {path.name for path in directory.iterdir()}
    assert names == {"config.yaml", "overrides.yaml", "metrics.json", "history.csv", "wiring.png", "checkpoints"}
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    config = OmegaConf.load(directory / "config.yaml")
    assert config.model.widths == [40, 30], "the last width is rounded up to a multiple of the classes"
    assert config.data.val_fraction == 0.2
    assert "data.val_fraction=0.2" in OmegaConf.load(directory / "overrides.yaml")
    results = metrics(directory)
    wanted = {"test/acc", "test/acc_soft", "test/loss", "val/acc", "train/seconds", "epochs", "parameters", "git"}
    assert wanted <= set(results)
    assert results["epochs"] == 2
    assert results["parameters"] == (40 + 30) * 64
    assert results["tables"] == 70
    with open(directory / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert max(float(row["val/acc"]) for row in rows) == pytest.approx(results["val/acc"])
    assert all(row[column] for row in rows for column in row)


def test_the_same_seed_repeats_and_another_does_not(train):
    first, again, other = train(name="first"), train(name="again"), train("seed=7", name="other")
    weights = [read(path / "checkpoints" / "last.ckpt")["state_dict"] for path in (first, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    table = "network.model.layers.0.nodes.weight"
    assert not torch.equal(weights[0][table], weights[2][table])


@pytest.mark.parametrize("layer", ["random_routing", "learnable_routing"])
def test_continuing_from_the_last_checkpoint_equals_not_having_stopped(train, layer):
    words = [f"layer={layer}", "layer_config.flip_probability=0.1", "scheduler=step", "scheduler.step_size=1"]
    whole = train(*words, "trainer.max_epochs=4", name="whole")
    half = train(*words, "trainer.max_epochs=2", name="half")
    rest = train(*words, "trainer.max_epochs=4", f"ckpt={half}/checkpoints/last.ckpt", name="rest")
    expected = read(whole / "checkpoints" / "last.ckpt")["state_dict"]
    found = read(rest / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert metrics(rest)["test/acc"] == metrics(whole)["test/acc"]
    assert metrics(rest)["val/acc"] == metrics(whole)["val/acc"]
    assert metrics(rest)["epochs"] == 4
    with open(rest / "history.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["2", "3"]


def test_a_continued_training_drops_what_it_would_have_dropped(train):
    words = ["model=ternary_mlp", "model.widths=[16,16]", "model.dropout=0.5", "scheduler=none"]
    states: dict[str, Any] = {}
    for name, more in (("whole", []), ("half", ["trainer.max_epochs=1"]), ("rest", ["ckpt={}/checkpoints/last.ckpt"])):
        directory = train(*words, *(word.format(states.get("directory")) for word in more), name=name)
        states["directory"] = directory
        states[name] = read(directory / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.equal(tensor, states["rest"][name]) for name, tensor in states["whole"].items())
    assert not torch.equal(states["half"]["network.model.fc.weight"], states["whole"]["network.model.fc.weight"])


def test_a_last_batch_of_one_sample_is_refused_where_it_cannot_be_normalised(train, tmp_path):
    size = len(Digits().load().train.y)
    with pytest.raises(TrainingError, match=rf"batch_size={size - 1}: leaves a batch of one sample, which batch norm"):
        train("model=ternary_mlp", "model.widths=[16]", f"batch_size={size - 1}")
    assert not (tmp_path / "run" / "checkpoints").exists()
    train("model=ternary_lstm", "model.hidden_size=8", f"batch_size={size - 1}", "trainer.max_epochs=1", name="lstm")


def test_a_run_continued_in_its_own_directory_keeps_one_row_per_epoch(train):
    words = ["scheduler=none"]
    directory = train(*words)
    train(*words, "trainer.max_epochs=3", f"ckpt={directory}/checkpoints/last.ckpt")
    with open(directory / "history.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    assert metrics(directory)["epochs"] == 3


def test_a_checkpoint_alone_gives_the_runs_accuracy(train):
    directory = train("node=probabilistic", "optimizer.lr=0.05")
    results = evaluate(directory / "checkpoints" / "best.ckpt")
    for name in ("test/acc", "test/acc_soft"):
        assert results[name] == pytest.approx(metrics(directory)[name], abs=1e-6)
    network = load_network(directory / "checkpoints" / "best.ckpt")
    assert not network.training
    raw = torch.randint(0, 17, (5, 1, 8, 8), dtype=torch.uint8)
    assert network.predict(raw).shape == (5,)


def test_best_is_the_earliest_of_equals_and_holds_weights_only(train):
    directory = train("optimizer=sgd", "optimizer.lr=1e-12", "optimizer.momentum=0")  # nothing is ever learned
    best = read(directory / "checkpoints" / "best.ckpt")
    assert best["epoch"] == 0
    assert "optimizer_states" not in best
    assert metrics(directory)["best_epoch"] == 0
    last = read(directory / "checkpoints" / "last.ckpt")
    assert last["epoch"] == 1
    assert last["optimizer_states"]


def test_a_checkpoint_says_what_it_is(train):
    about = read(train() / "checkpoints" / "last.ckpt")[KEY]
    assert about["format"] == 1
    assert about["input_shape"] == [1, 8, 8]
    assert about["class_names"] == [str(digit) for digit in range(10)]
    assert about["config"]["layer"] == {"name": "random_routing"}
    assert (about["mean"], about["std"]) == ([0.0], [16.0])


def test_checkpoints_of_other_networks_and_broken_ones_are_refused(train, tmp_path):
    last = train(name="first") / "checkpoints" / "last.ckpt"
    with pytest.raises(CheckpointError, match=r"belongs to another network: node\.n is 6 there, 4 here"):
        train("node.n=4", f"ckpt={last}", name="other")
    with pytest.raises(CheckpointError, match="holds weights only"):
        train(f"ckpt={last.with_name('best.ckpt')}", name="weights")
    with pytest.raises(CheckpointError, match="there is no such file"):
        train("ckpt=nowhere.ckpt", name="nowhere")
    with pytest.raises(CheckpointError, match=r"other settings: optimizer\.lr is 0\.1 there, 0\.01 here"):
        train("optimizer.lr=0.01", f"ckpt={last}", name="rate")
    with pytest.raises(CheckpointError, match="has 2 epochs already; set trainer.max_epochs=2 higher"):
        train(f"ckpt={last}", name="done")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match="is not a checkpoint of difflut_lab"):
        read(tmp_path / "foreign.ckpt")
    content = last.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path / "cut.ckpt")
    torch.save({KEY: {"format": 99}}, tmp_path / "future.ckpt")
    with pytest.raises(CheckpointError, match="has format 99; this version of difflut_lab reads format 1"):
        read(tmp_path / "future.ckpt")


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_loading_runs_no_code_of_the_file(tmp_path, capsys):
    torch.save({KEY: Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path / "evil.ckpt")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("node", ["dwn", "probabilistic"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(train, tmp_path, monkeypatch, node):
    from difflut_lab.training.module import Classifier

    original = Classifier.on_train_epoch_start

    def poison_in_second_epoch(self):
        original(self)
        if self.current_epoch == 1:
            with torch.no_grad():
                self.network.model.layers[1].nodes.weight[3, 5] = float("nan")

    monkeypatch.setattr(Classifier, "on_train_epoch_start", poison_in_second_epoch)
    with pytest.raises(TrainingError, match=r"epoch 2: 'weight' of model\.layers\.1\.nodes .*is not finite"):
        train(f"node={node}", "trainer.max_epochs=5", name="run")
    for name in ("best.ckpt", "last.ckpt"):
        content = read(tmp_path / "run" / "checkpoints" / name)
        assert content["epoch"] == 0
        assert all(tensor.isfinite().all() for tensor in content["state_dict"].values())


@pytest.mark.parametrize("node", ["dwn", "probabilistic"])
def test_the_record_says_which_kernels_ran_and_they_agree(train, node):
    words = [f"node={node}", "layer_config.flip_probability=0.1"]
    reference, fast = train(*words, "kernels=reference", name="reference"), train(*words, name="fast")
    assert set(metrics(reference)["kernels"].values()) == {"reference"}
    assert "cpu" in metrics(fast)["kernels"].values()
    assert metrics(fast)["test/acc"] == pytest.approx(metrics(reference)["test/acc"], abs=0.05)


@pytest.mark.parametrize("node", ["dwn", "probabilistic"])
def test_a_whole_step_in_tritons_interpreter_equals_the_reference(train, node):
    words = [f"node={node}", "model.widths=[20,10]", "encoder.bits=1", "layer_config.flip_probability=0.1"]
    words += ["optimizer=sgd", "fast_dev_run=true", "batch_size=32", "eval_batch_size=32"]
    reference, fast = train(*words, "kernels=reference", name="reference"), train(*words, "kernels=triton", name="fast")
    assert metrics(fast)["kernels"]["lookup"] == "triton"
    expected, found = (read(path / "checkpoints" / "last.ckpt")["state_dict"] for path in (reference, fast))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_a_gpu_that_is_not_there_is_named(train):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=gpu: there is no GPU here; use trainer=cpu"):
        train("trainer=gpu")


def test_ddp_is_refused_in_a_sweep(train):
    with pytest.raises(ConfigError, match="trainer=ddp cannot run inside a sweep"):
        train("trainer=ddp", sweep="some_sweep")


def test_fast_dev_run_takes_one_batch_of_everything(train):
    directory = train("fast_dev_run=true", "trainer.max_epochs=40")
    assert metrics(directory)["epochs"] == 1
    assert read(directory / "checkpoints" / "last.ckpt")["global_step"] == 1


@pytest.mark.parametrize(
    "words",
    [
        ["callbacks=early_stopping", "callbacks.early_stopping.patience=1", "trainer.max_epochs=30"],
        ["trainer.gradient_clip_val=0.5", "optimizer=adamw", "optimizer.lr=0.1", "scheduler=cosine"],
        ["trainer.precision=bf16-mixed", "layer_config.grad_stabilization=batch"],
        ["node=probabilistic", "encoder=thermometer", "layer=feature_wise_groups", "layer.num_groups=5"],
        ["logger=csv"],
        ["layer=learnable_routing", "layer.candidates=8", "+model.per_layer.1.layer=random_routing"],
    ],
    ids=lambda words: words[0],
)
def test_what_can_be_chosen_trains(train, words):
    results = metrics(train(*words))
    assert results["test/acc"] > 0.15
    if words[0] == "callbacks=early_stopping":
        assert results["epochs"] < 30
