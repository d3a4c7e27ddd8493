"""What is measured of ternary layers in training, and what stops it."""

from __future__ import annotations

import csv

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from difflut_lab.errors import ConfigError, TrainingError
from difflut_lab.ternary import TernaryLinear
from difflut_lab.training.checkpoint import load_network
from difflut_lab.training.health import COLUMNS, TernaryHealth, ternary_layers

MLP = ["model=ternary_mlp", "model.widths=[24,16,16]"]


def rows(directory):
    with open(directory / "health.csv") as file:
        return list(csv.DictReader(file))


def test_every_ternary_layer_has_a_row_per_epoch_that_says_what_its_codes_are(train):
    directory = train(*MLP, "trainer.max_epochs=3")
    found = rows(directory)
    assert tuple(found[0]) == COLUMNS
    assert [(row["epoch"], row["layer"]) for row in found] == [
        (str(epoch), layer) for epoch in range(3) for layer in ("layers.3", "layers.6")
    ]
    layers = ternary_layers(load_network(directory / "checkpoints" / "last.ckpt"))
    for row in found[-2:]:
        codes = layers[row["layer"]].quantized().codes
        for column, code in (("negative", -1), ("zero", 0), ("positive", 1)):
            assert float(row[column]) == pytest.approx(float((codes == code).float().mean()), abs=1e-5)
        assert int(row["dead_channels"]) == int((codes == 0).all(dim=1).sum())
        assert float(row["grad_norm"]) > 0
    assert any(float(row["flip_rate"]) > 0 for row in found)


def test_codes_that_do_not_move_have_a_flip_rate_of_zero(train):
    directory = train(*MLP, "optimizer=sgd", "optimizer.lr=1e-12", "scheduler=none")
    assert {float(row["flip_rate"]) for row in rows(directory)} == {0.0}


def test_networks_of_tables_and_float_twins_have_no_such_file(train):
    assert not (train(name="tables") / "health.csv").exists()
    assert not (train(*MLP, "quantizer=none", name="float") / "health.csv").exists()


def test_a_layer_of_zeros_stops_the_training_with_its_name(train, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"quantizer.threshold=0.9: every code is 0, because the largest weight is"):
        train(*MLP, "quantizer=fixed", "quantizer.threshold=0.9", name="start")
    # weight decay takes every weight below the threshold
    words = [*MLP, "quantizer=fixed", "quantizer.threshold=0.2", "optimizer=sgd", "scheduler=none"]
    with pytest.raises(TrainingError, match=r"after epoch 1: every code of layer 'layers\.\d' is 0"):
        train(*words, "optimizer.lr=0.1", "optimizer.weight_decay=5", "optimizer.momentum=0", name="decay")
    assert not (tmp_path / "decay" / "checkpoints").exists()


def test_zeros_are_found_before_the_first_step(train, monkeypatch):
    from difflut_lab.ternary.quantizers import Fixed

    monkeypatch.setattr(Fixed, "prepare", lambda self, weight: None)
    with pytest.raises(TrainingError, match=r"before the first step: every code of layer 'layers.3' is 0"):
        train(*MLP, "quantizer=fixed", "quantizer.threshold=0.9")


def test_histograms_go_to_wandb(train, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr("difflut_lab.training.health.log_histograms", lambda *arguments: logged.append(arguments))
    train(*MLP)
    assert [epoch for _, _, epoch in logged] == [0, 1]
    histograms = logged[-1][1]
    assert set(histograms) == {f"health/layers.{i}/{what}" for i in (3, 6) for what in ("codes", "latent")}
    for counts, edges in histograms.values():
        assert len(edges) == len(counts) + 1
        assert sum(counts) in (24 * 16, 16 * 16)


@pytest.mark.parametrize("model", ["ternary_resnet", "ternary_vit"])
@pytest.mark.parametrize("mode", ["none", "layerwise", "nodewise", "batch"])
def test_flips_and_stabilisation_act_in_ternary_networks(train, model, mode):
    small = {
        "ternary_resnet": ["model.widths=[8,8,12]", "model.blocks=[1,1,1]"],
        "ternary_vit": ["model.d_model=12", "model.depth=1"],
    }
    words = [f"model={model}", *small[model], "trainer.max_epochs=1", f"layer_config.grad_stabilization={mode}"]
    weights = []
    for probability in (0, 0.05):
        directory = train(*words, f"layer_config.flip_probability={probability}", name=f"flip{probability}")
        network = load_network(directory / "checkpoints" / "last.ckpt")
        weights.append(next(iter(ternary_layers(network).values())).weight)
    assert all(torch.isfinite(weight).all() for weight in weights)
    assert not torch.equal(*weights)


class _Step(L.LightningModule):
    """A ternary layer that is trained on one batch."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.layer, self.fused = TernaryLinear(8, 2), fused

    def training_step(self, batch, batch_index):
        return self.layer(batch).square().sum()

    def validation_step(self, batch, batch_index):
        return None

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), fused=self.fused)


def test_norms_are_those_of_the_gradients_not_of_scaled_ones(tmp_path):
    norms = []
    for fused in (False, True):
        # what Lightning makes of 16-mixed on a GPU
        precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
        module, directory = _Step(fused), tmp_path / str(fused)
        directory.mkdir()
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, plugins=[precision],
            callbacks=[TernaryHealth(module, directory / "health.csv")],
        )  # fmt: skip
        batches = torch.ones(1, 4, 8)
        trainer.fit(module, batches, batches)
        norms.append(float(rows(directory)[0]["grad_norm"]))
    assert norms[0] > 0
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
