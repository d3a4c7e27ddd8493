"""Ternary networks in mixed precision."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from difflut_lab.ternary import TernaryLayer
from difflut_lab.training.checkpoint import load_network, read

MODELS = {
    "ternary_mlp": ["model.widths=[32,16]"],
    "ternary_resnet": ["model.widths=[8,12]", "model.blocks=[1,1]"],
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("model", MODELS)
def test_bf16_trains_with_clipping_and_every_recipe(train: Callable[..., Path], model: str, optimizer: str) -> None:
    rate = {"sgd": 0.1, "adamw": 0.01}[optimizer]
    words = [f"model={model}", *MODELS[model], f"optimizer={optimizer}", f"optimizer.lr={rate}"]
    words += ["quantizer=ttq", "model.activation_bits=8", "trainer.precision=bf16-mixed", "batch_size=32"]
    words += ["trainer.max_epochs=3", "trainer.gradient_clip_val=1.0", "label_smoothing=0.1", "ema_decay=0.9"]
    words += ["+augmentation@augmentations.mixup=mixup", "augmentations.mixup.probability=0.5"]
    words += ["optimizer.weight_decay=1e-4", *(["optimizer.fused=false"] if optimizer == "adamw" else [])]
    directory = train(*words)
    with open(directory / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["train/loss"]) < float(rows[0]["train/loss"])
    assert json.loads((directory / "metrics.json").read_text())["test/acc"] > 0.3
    state = read(directory / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(tensor.dtype == torch.float32 for tensor in state.values() if tensor.is_floating_point())
    network = load_network(directory / "checkpoints" / "last.ckpt")
    ternary = [layer for layer in network.modules() if isinstance(layer, TernaryLayer) and not layer.is_float]
    assert ternary
    for layer in ternary:
        with torch.autocast("cpu", torch.bfloat16):
            low = layer.quantized()
        assert all(torch.equal(*pair) for pair in zip(low, layer.quantized(), strict=True))
