"""A run's checkpoint is packed into a file that predicts alone, and the script says what became of it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from difflut_lab.errors import CheckpointError, ConfigError
from difflut_lab.ternary import TernaryLayer
from difflut_lab.ternary.packed.file import load_packed, save_packed
from difflut_lab.ternary.packed.layers import PackedLayer, PackError
from difflut_lab.ternary.packing import pack
from difflut_lab.training.checkpoint import load_network
from difflut_lab.training.packed import compare, load_packed_network, pack_checkpoint

ROOT = Path(__file__).parents[2]
RESNET = ["model=ternary_resnet", "model.widths=[4,8]", "model.blocks=[1,1]", "model.stem=cifar"]
MLP = ["model=ternary_mlp", "model.widths=[24,16]"]


def raw(count: int = 6) -> torch.Tensor:
    return torch.randint(0, 17, (count, 1, 8, 8), dtype=torch.uint8)


@pytest.mark.parametrize(
    "words", [[*MLP, "quantizer=ttq"], [*RESNET, "model.activation=ternary"]], ids=["mlp", "resnet"]
)
def test_a_packed_file_alone_predicts_from_raw_features(train, words):
    checkpoint = train(*words) / "checkpoints" / "best.ckpt"
    packed = pack_checkpoint(checkpoint)
    assert packed.path == checkpoint.with_name("best.safetensors")
    loaded, network = load_packed_network(packed.path), load_network(checkpoint)
    assert loaded.class_names == network.class_names
    assert any(isinstance(module, PackedLayer) for module in loaded.modules())
    x = raw()
    assert torch.equal(loaded(x), packed.network(x))
    torch.testing.assert_close(loaded(x), network(x).detach(), rtol=1e-5, atol=1e-5)
    # without normalisation, it is the model alone
    assert torch.equal(load_packed(packed.path)(loaded.normalise(x)), loaded(x))


def test_sizes_and_agreement(train):
    directory = train(*MLP, "model.quantize_first=true", "model.quantize_last=true")
    checkpoint = directory / "checkpoints" / "best.ckpt"
    packed = pack_checkpoint(checkpoint, storage="base3")
    assert [(layer.name, layer.weight_shape) for layer in packed.layers] == [
        ("layers.0", (24, 64)), ("layers.3", (16, 24)), ("fc", (10, 16)),
    ]  # fmt: skip
    first = packed.layers[0]
    # 13 bytes hold a row of 64 codes, to which come scale and bias
    assert (first.float_bytes, first.packed_bytes) == (4 * 24 * 64, 24 * 13 + 2 * 4 * 24)
    layer = load_network(checkpoint).get_submodule("model.layers.0")
    assert isinstance(layer, TernaryLayer)
    codes = layer.quantized().codes
    assert first.zeros == pytest.approx(float((codes == 0).float().mean()))
    assert packed.packed_bytes == packed.path.stat().st_size
    agreement = compare(checkpoint, packed.network)
    accuracy = json.loads((directory / "metrics.json").read_text())["test/acc"]
    assert agreement.accuracy == pytest.approx(accuracy, abs=1e-6)
    assert (agreement.packed_accuracy, agreement.differing, agreement.samples) == (agreement.accuracy, 0, 360)


def test_a_difference_is_counted(train):
    checkpoint = train(*MLP) / "checkpoints" / "best.ckpt"
    packed = pack_checkpoint(checkpoint).network
    layer = packed.get_submodule("model.layers.3")
    assert isinstance(layer, PackedLayer) and layer.bias is not None
    layer.bias.neg_().add_(3)
    agreement = compare(checkpoint, packed)
    assert agreement.differing > 0 and agreement.packed_accuracy != agreement.accuracy


@pytest.mark.parametrize(
    ("option", "rounds"), [(None, False), ("model.activation_bits=8", True), ("model.activation=ternary", True)]
)
def test_differences_are_errors_where_no_activation_is_rounded(train, capsys, monkeypatch, option, rounds):
    checkpoint = train(*MLP, *([option] if option else [])) / "checkpoints" / "best.ckpt"
    agreement = compare(checkpoint, pack_checkpoint(checkpoint).network)
    assert agreement.rounds == rounds
    monkeypatch.syspath_prepend(ROOT / "scripts")
    show = importlib.import_module("pack")._show_agreement
    differing = dataclasses.replace(agreement, differing=3)
    if rounds:
        show(differing)
        assert "They name different classes for 3 of the 360 test samples" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match="Error: the packed network differs on 3 of 360 test samples"):
            show(differing)


def test_networks_without_ternary_layers_are_refused(train, tmp_path):
    checkpoint = train() / "checkpoints" / "best.ckpt"
    with pytest.raises(PackError, match="holds no ternary layers"):
        pack_checkpoint(checkpoint)
    assert not checkpoint.with_name("best.safetensors").exists()
    with pytest.raises(CheckpointError, match="there is no such file"):
        pack_checkpoint(tmp_path / "nowhere.ckpt")


def test_what_cannot_be_written_or_read(train, tmp_path):
    checkpoint = train(*MLP) / "checkpoints" / "best.ckpt"
    with pytest.raises(CheckpointError, match=r"output=.*/none/net: cannot be written: No such file or directory"):
        pack_checkpoint(checkpoint, tmp_path / "none" / "net")
    with pytest.raises(ConfigError, match=r"storage=3bit: must be one of 2bit, base3"):
        pack_checkpoint(checkpoint, storage="3bit")  # type: ignore[arg-type]  # that is the point
    model = pack(load_network(checkpoint).model)
    save_packed(model, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match=r"holds a model without the normalisation of its inputs"):
        load_packed_network(tmp_path / "bare.safetensors")


def start(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "pack.py"), *words],
        capture_output=True, text=True, timeout=300, check=False, cwd=cwd, env=os.environ | {"COLUMNS": "120"},
    )  # fmt: skip


def test_the_script_prints_sizes_and_both_accuracies(train, tmp_path):
    directory = train(*MLP)
    checkpoint, output = directory / "checkpoints" / "best.ckpt", tmp_path / "net.safetensors"
    result = start(f"ckpt={checkpoint}", f"output={output}", "storage=base3")
    assert result.returncode == 0, result.stderr
    accuracy = 100 * json.loads((directory / "metrics.json").read_text())["test/acc"]
    assert result.stdout.count(f"{accuracy:.2f} %") == 2
    assert "Both give the same class for each of the 360 test samples." in result.stdout
    for word in ("layers.3", "16 x 24", "whole network", str(output)):
        assert word in result.stdout
    assert load_packed_network(output)(raw()).shape == (6, 10)
    numbered = start(f"ckpt={checkpoint}", "output=5", cwd=tmp_path)
    assert numbered.returncode == 0, numbered.stderr
    assert (tmp_path / "5").exists()
    refused = start(f"ckpt={checkpoint}", "out=x")
    assert refused.returncode == 1
    assert refused.stderr == "Error: write ckpt=PATH, output=PATH, storage=2bit or base3, and data.KEY=VALUE.\n"
