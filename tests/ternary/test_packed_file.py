"""Files of packed networks: self-contained, small, and refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from difflut_lab import REGISTRY
from difflut_lab.errors import CheckpointError, ConfigError
from difflut_lab.layers import LayerConfig
from difflut_lab.ternary import TernaryConv2d, TernaryLinear
from difflut_lab.ternary.packed.file import load_packed, read_header, save_packed
from difflut_lab.ternary.packed.layers import PackedLayer, PackError
from difflut_lab.ternary.packing import pack

IMAGE = (3, 8, 8)
CONFIGS: dict[str, dict[str, Any]] = {
    "ternary_mlp": {"widths": [20, 12]},
    "ternary_resnet": {"depth": 20, "widths": [4, 8, 8], "blocks": [1, 1, 1], "stem": "cifar", "quantize_first": True},
    "ternary_vit": {"patch_size": 4, "d_model": 12, "num_heads": 3, "depth": 1, "activation_bits": 8},
    "ternary_lstm": {"hidden_size": 12},
}


def config_of(name: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "input_shape": IMAGE, "num_classes": 10, **CONFIGS[name], **options}


def packed_of(config: dict[str, Any], storage: Any = "2bit") -> nn.Module:
    """A packed model whose float parameters and statistics are not those that it is built with."""
    torch.manual_seed(0)
    model: nn.Module = REGISTRY.build("model", config)
    model.train()(torch.randn(16, *IMAGE))
    for parameter in model.parameters():
        parameter.data += 0.1 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0
    return pack(model, storage=storage)


def same(model: nn.Module, other: nn.Module) -> bool:
    state, theirs = model.state_dict(), other.state_dict()
    return list(state) == list(theirs) and all(torch.equal(state[name], theirs[name]) for name in state)


@pytest.mark.parametrize("storage", ["2bit", "base3"])
@pytest.mark.parametrize("quantizer", ["absmean", {"name": "ttq", "granularity": "group", "group_size": 5}], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_alone_gives_the_packed_model(name: str, quantizer: Any, storage: Any, tmp_path: Path) -> None:
    config = config_of(name, quantizer=quantizer, layer_config=LayerConfig(flip_probability=0.1))
    packed = packed_of(config, storage)
    save_packed(packed, tmp_path / "net.safetensors", config=config)
    loaded = load_packed(tmp_path / "net.safetensors")
    assert type(loaded) is type(packed) and same(loaded, packed)
    x = torch.randn(4, *IMAGE)
    assert torch.equal(loaded(x), packed(x))
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert str(loaded) == str(packed)


def own(channels: int = 4, stride: int = 1) -> nn.Sequential:
    """A model built by hand, with a batch norm that is folded and one that is not."""
    return nn.Sequential(
        nn.BatchNorm2d(3),
        TernaryConv2d(3, channels, 3, stride, quantizer="ttq"),
        nn.BatchNorm2d(channels),
        nn.Flatten(),
        nn.LazyLinear(2),
    )


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module]:
    model = own()
    model(torch.randn(4, *IMAGE))
    packed = pack(model)
    save_packed(packed, tmp_path / "own.safetensors")
    return tmp_path / "own.safetensors", packed


def built(model: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        model(torch.zeros(2, *IMAGE))
    return model


def test_a_model_built_by_hand_is_loaded_into(saved: tuple[Path, nn.Module]) -> None:
    path, packed = saved
    with pytest.raises(CheckpointError, match=r"does not say how its model is built.*load_packed\(path, into=model\)"):
        load_packed(path)
    model = built(own())
    assert load_packed(path, into=model) is model
    assert same(model, packed)
    x = torch.randn(2, *IMAGE)
    assert torch.equal(model(x), packed(x))


def test_a_single_layer(tmp_path: Path) -> None:
    packed = pack(TernaryLinear(6, 4), storage="base3")
    save_packed(packed, tmp_path / "layer.safetensors")
    loaded = load_packed(tmp_path / "layer.safetensors", into=TernaryLinear(6, 4, seed=7))
    assert isinstance(loaded, PackedLayer) and same(loaded, packed)


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    config = config_of("ternary_mlp", quantizer="ttq", activation_bits=8)
    path = tmp_path / "net.safetensors"
    save_packed(packed_of(config, "base3"), path, config=config, about={"class_names": ["a", "b"]})
    header = read_header(path)
    assert header["format"] == 1
    assert header["config"] == config | {"input_shape": list(IMAGE)}
    assert header["about"] == {"class_names": ["a", "b"]}
    assert header["folded"] == ["layers.4"]
    assert header["layers"] == {
        "layers.3": {
            "weight_shape": [12, 20],
            "group_size": None,
            "activation_bits": 8,
            "normalized": True,
            "storage": "base3",
        }
    }
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("layers.3.codes").dtype == torch.uint8


@pytest.mark.parametrize(("storage", "bits"), [("2bit", 2), ("base3", 1.6)])
def test_a_file_has_a_sixteenth_of_the_float_network(storage: Any, bits: float, tmp_path: Path) -> None:
    config = config_of("ternary_mlp", widths=[512, 512], quantize_first=True, quantize_last=True)
    model: nn.Module = REGISTRY.build("model", config)
    save_packed(pack(model, storage=storage), tmp_path / "net.safetensors", config=config)
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith("weight"))
    # beside the codes, a scale and a bias per output, and the description
    wanted = weights * bits / 8 + 2 * 4 * (512 + 512 + 10)
    assert (tmp_path / "net.safetensors").stat().st_size == pytest.approx(wanted, abs=3000)
    assert list(tmp_path.iterdir()) == [tmp_path / "net.safetensors"]


def test_what_is_not_packed_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"This TernaryLinear is not packed: save what pack\(model\) returns"):
        save_packed(TernaryLinear(4, 4), tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_description_must_be_the_models(tmp_path: Path) -> None:
    config = config_of("ternary_mlp")
    with pytest.raises(ConfigError, match=r"config.name=ternary_vit: the model is a TernaryMLP"):
        save_packed(packed_of(config), tmp_path / "net", config=config_of("ternary_vit"))
    with pytest.raises(ConfigError, match=r"config.name: must be given"):
        save_packed(packed_of(config), tmp_path / "net", config={key: config[key] for key in config if key != "name"})
    with pytest.raises(ConfigError, match=r"Unknown model 'ternary_mpl'. Did you mean 'ternary_mlp'"):
        save_packed(packed_of(config), tmp_path / "net", config=config | {"name": "ternary_mpl"})
    with pytest.raises(ConfigError, match=r"<object .*: must be a plain value"):
        save_packed(packed_of(config), tmp_path / "net", config=config | {"quantizer": object()})
    assert not list(tmp_path.iterdir())


def rewritten(path: Path, **changes: Any) -> Path:
    """The file with another description."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    save_file(tensors, path, {"difflut_lab": json.dumps(read_header(path) | changes)})
    return path


def test_files_of_another_kind_are_refused(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, _ = saved
    with pytest.raises(CheckpointError, match=r"nowhere.safetensors: there is no such file"):
        load_packed(tmp_path / "nowhere.safetensors")
    torch.save({}, tmp_path / "best.ckpt")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-9])
    for name in ("best.ckpt", "cut", "."):
        with pytest.raises(CheckpointError, match=r"is no safetensors file, or damaged"):
            load_packed(tmp_path / name)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other.safetensors: is not a packed network of difflut_lab"):
        load_packed(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"has format 2; this version of difflut_lab reads format 1"):
        load_packed(rewritten(path, format=2))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (own(stride=2), r"stride of layer '1' is \[1, 1\] there, \[2, 2\] here"),
        (own(channels=5), r"weight_shape of layer '1' is \[4, 3, 3, 3\] there, \[5, 3, 3, 3\] here"),
        (nn.Sequential(TernaryConv2d(3, 4, 3), nn.BatchNorm2d(4)), r"not in both are 0, 1, 2"),
    ],
)
def test_a_file_of_another_model_is_refused(model: nn.Sequential, said: str, saved: tuple[Path, nn.Module]) -> None:
    with pytest.raises(CheckpointError, match=f"belongs to another model: {said}"):
        load_packed(saved[0], into=model)


def test_float_parts_must_fit_too(saved: tuple[Path, nn.Module]) -> None:
    model = built(own())
    model[4] = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match=r"does not fit this model: size mismatch for 4.weight"):
        load_packed(saved[0], into=model)


def test_an_unregistered_model_is_named(tmp_path: Path) -> None:
    config = config_of("ternary_mlp")
    save_packed(packed_of(config), tmp_path / "net", config=config)
    with pytest.raises(ConfigError, match=r"Unknown model 'theirs'"):
        load_packed(rewritten(tmp_path / "net", config=config | {"name": "theirs"}))
    with pytest.raises(CheckpointError, match=r"its model 'ternary_mlp' is built otherwise here: .*'depth'"):
        load_packed(rewritten(tmp_path / "net", config=config | {"depth": 3}))


def test_an_interrupted_write_leaves_the_file_that_was_there(
    saved: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, packed = saved
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save_packed(packed, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("broken", ["digit", "length"])
def test_codes_that_are_none_are_refused(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "layer.safetensors"
    save_packed(pack(TernaryLinear(33, 7), storage="base3"), path)
    with safe_open(path, framework="pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    codes = state["codes"].clone()
    codes[0, 0] = 250
    save_file(state | {"codes": codes if broken == "digit" else codes[:, :3].contiguous()}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"layer.safetensors: does not fit this model: codes: "):
        load_packed(path, into=TernaryLinear(33, 7))
