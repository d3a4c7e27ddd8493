"""Every registered part passes its check, and every YAML file builds a network that takes a step of training.

Parametrised over the registry and the configuration tree: a new part or file is tested without a new test.
"""

from __future__ import annotations

import runpy
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from hydra import compose, initialize_config_dir

from difflut_lab import REGISTRY, schema
from difflut_lab.errors import ConfigError
from difflut_lab.testing import (
    check_augmentation,
    check_encoder,
    check_head,
    check_initializer,
    check_layer,
    check_model,
    check_node,
    check_quantizer,
    check_regularizer,
    check_ternary_layer,
)
from difflut_lab.training.compose import Config, build_model, groups_of, instantiate, model_of, resolve
from difflut_lab.training.paths import config_directory, register_resolvers

EXAMPLES = Path(__file__).parents[1] / "examples" / "my_layers.py"
FAN_INS = (1, 2, 4, 6)
# data that is not here: samples have the shape that it would have
SHAPES = {"mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
# groups of which a run may have several, under keys of their own
PLACES = {"schedule": "+schedule@schedules.head.tau=", "augmentation": "+augmentation@augmentations.mine="}
# what makes a model small enough for a test
SMALL = {
    "lut_mlp": ["model.widths=[40,20]"],
    "lut_conv": ["model.widths=[40,20]"],
    "ternary_mlp": ["model.widths=[20,20]"],
    "ternary_resnet": ["model.widths=[8,12]", "model.blocks=[1,1]"],
    "ternary_vit": ["model.d_model=12", "model.depth=1"],
    "ternary_lstm": ["model.hidden_size=16"],
}
# groups that only some models have
MODELS = {"quantizer": "ternary_mlp"}
# with the threshold that is its default it refuses weights that start as usual
FIXED = {"name": "fixed", "threshold": 0.02}
# mandatory values
NEEDED = {
    "data/npz": ["data.path=somewhere.npz"],
    "quantizer/fixed": ["quantizer.threshold=0.02"],
    "schedule": ["schedules.head.tau.end=3"],
}

# quantizers that do not suit a layer: initial batch norms have no negative scales, for which ttq learns another one
UNFIT = {("batch_norm", "ttq")}
# how layers are used that are not simply called
USES: dict[str, Any] = {
    "lstm_cell": lambda cell, x: cell(x, cell(x)),
    # the checks take the first dimension for the batch
    "lstm": lambda lstm, x: lstm(x)[0] if lstm.batch_first else lstm(x.transpose(0, 1))[0].transpose(0, 1),
}


def built_in(kind: str) -> list[str]:
    """The names of the package's parts: other tests of the same process register parts of their own."""
    return [name for name in REGISTRY.names(kind) if REGISTRY.get(kind, name).__module__.startswith("difflut_lab.")]


QUANTIZERS: dict[str, Any] = {name: name for name in built_in("quantizer")} | {"fixed": FIXED}


def variants(kind: str, name: str) -> Iterator[dict[str, Any]]:
    """The defaults of a part; and each choice of each option that is a word or a truth value, one at a time."""
    yield {}
    for option, parameter in schema.options(REGISTRY.get(kind, name), REGISTRY.provided(kind)).items():
        annotation = parameter.annotation
        marks = typing.get_args(annotation)[1:] if typing.get_origin(annotation) is Annotated else ()
        if typing.get_origin(annotation) is Annotated:
            annotation = typing.get_args(annotation)[0]
        members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        choices = [choice for each in members if typing.get_origin(each) is Literal for choice in typing.get_args(each)]
        if annotation is bool:
            choices = [True, False]
        elif schema.PartOf("regularizer") in marks:
            choices = [regularizer for regularizer in built_in("regularizer") if fits(name, regularizer)]
        elif option == "quantizer":
            choices = [spec for quantizer, spec in QUANTIZERS.items() if (name, quantizer) not in UNFIT]
        elif option == "bias_quantizer":
            # quantised as weights are, by the same base class
            choices = ["ttq"]
        yield from ({option: choice} for choice in choices if choice != parameter.default)


def fits(node: str, regularizer: str) -> bool:
    """Whether the regulariser takes the nodes: some need tables."""
    try:
        REGISTRY.get_node(node)(num_nodes=1, regularizer=regularizer)
    except ConfigError:
        return False
    return True


def fan_ins(node: str) -> list[int]:
    """Inputs per node that the nodes take."""
    accepted = []
    for n in FAN_INS:
        try:
            schema.validate_part("node", {"name": node, "n": n}, "node")
        except ConfigError:
            continue
        accepted.append(n)
    return accepted


def cases(kind: str) -> list[Any]:
    return [
        pytest.param(name, options, id="-".join([name, *(f"{key}={value}" for key, value in options.items())]))
        for name in built_in(kind)
        for options in variants(kind, name)
    ]


@pytest.mark.parametrize(("name", "n"), [(name, n) for name in built_in("node") for n in fan_ins(name)])
def test_nodes_of_every_fan_in(name: str, n: int) -> None:
    check_node(name, n=n)


@pytest.mark.parametrize(("name", "options"), cases("node"))
def test_nodes(name: str, options: dict[str, Any]) -> None:
    check_node(name, **options)


@pytest.mark.parametrize("node", built_in("node"))
@pytest.mark.parametrize("layer", built_in("layer"))
def test_every_layer_with_every_node(layer: str, node: str) -> None:
    check_layer(layer, node_type=node)


@pytest.mark.parametrize(("name", "options"), cases("layer"))
def test_layers(name: str, options: dict[str, Any]) -> None:
    check_layer(name, node_type="dwn", n=3, **options)


@pytest.mark.parametrize(("name", "options"), cases("encoder"))
def test_encoders(name: str, options: dict[str, Any]) -> None:
    check_encoder(name, **options)


@pytest.mark.parametrize(("name", "options"), cases("head"))
def test_heads(name: str, options: dict[str, Any]) -> None:
    check_head(name, **options)


@pytest.mark.parametrize(("name", "options"), cases("initializer"))
def test_initializers(name: str, options: dict[str, Any]) -> None:
    check_initializer(name, **options)


@pytest.mark.parametrize(("name", "options"), cases("regularizer"))
def test_regularizers(name: str, options: dict[str, Any]) -> None:
    check_regularizer(name, **options)


@pytest.mark.parametrize(("name", "options"), cases("augmentation"))
def test_augmentations(name: str, options: dict[str, Any]) -> None:
    check_augmentation(name, **options)


@pytest.mark.parametrize(("name", "options"), cases("quantizer"))
def test_quantizers(name: str, options: dict[str, Any]) -> None:
    needed = {"threshold": FIXED["threshold"]} if name == "fixed" else {}
    if options.get("granularity") == "group":
        needed["group_size"] = 50
    check_quantizer(name, **needed, **options)


def test_a_quantizer_that_would_make_every_code_0_is_refused() -> None:
    with pytest.raises(ConfigError, match="threshold=0.33: every code is 0, .* a threshold of 0.05 suits"):
        check_quantizer("fixed")


@pytest.mark.parametrize(("name", "options"), cases("ternary"))
def test_ternary_layers(name: str, options: dict[str, Any]) -> None:
    uses = {"forward": USES[name]} if name in USES else {}
    check_ternary_layer(name, **uses, **options)


@pytest.fixture
def examples() -> Iterator[dict[str, Any]]:
    """What the plugin among the examples defines."""
    known = dict(REGISTRY._loaded("layer"))
    yield runpy.run_path(str(EXAMPLES), run_name="my_layers")
    for name in set(REGISTRY._parts["layer"]) - set(known):
        del REGISTRY._parts["layer"][name]


@pytest.mark.parametrize(("layer", "options"), [("MyLayer", {"span": 10}), ("MyCustomLayer", {"foo": 7})])
def test_examples(examples: dict[str, Any], layer: str, options: dict[str, Any]) -> None:
    check_layer(examples[layer], **options)


def composed(words: list[str]) -> Config:
    """What the command line would make of the words, checked; of a model in the size for tests."""
    register_resolvers()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        words = [*words, *SMALL[compose("train", words).model.name]]
        return resolve(compose("train", words), words)


@pytest.mark.parametrize("name", built_in("model"))
def test_models(name: str) -> None:
    config = composed([f"model={name}"])
    groups = {group: config[group] for group in groups_of(model_of(config))}
    options = {key: value for key, value in config["model"].items() if key != "name"}
    check_model(name, input_shape=(1, 8, 8), groups=groups, **options)


FILES = sorted(path.relative_to(config_directory()) for path in config_directory().glob("*/*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.with_suffix("")))
def test_every_file_builds_a_network_that_takes_a_step(path: Path) -> None:
    group, name = path.parent.name, path.stem
    words = [f"model={MODELS[group]}"] if group in MODELS else []
    words += [PLACES.get(group, f"{group}=") + name, *NEEDED.get(group, []), *NEEDED.get(f"{group}/{name}", [])]
    config = composed(words)
    shape = SHAPES.get(config["data"]["name"], (1, 8, 8))
    random = torch.random.get_rng_state()
    model = build_model(config, shape, 10)
    assert torch.equal(random, torch.random.get_rng_state())
    x, y = torch.rand(64, *shape), torch.arange(64) % 10
    model.calibrate(x)
    optimizer = instantiate(config["optimizer"], "optimizer", model.parameters())
    steps = {"steps_per_epoch": 10}
    scheduler = instantiate(config["scheduler"], "scheduler", optimizer, **steps) if config["scheduler"] else None
    start = [parameter.detach().clone() for parameter in model.parameters()]
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    if scheduler:
        scheduler.step()
    assert torch.isfinite(loss)
    for before, parameter in zip(start, model.parameters(), strict=True):
        assert torch.isfinite(parameter).all() and not torch.equal(before, parameter)
    scores = model.eval()(x)
    assert scores.shape == (64, 10) and torch.isfinite(scores).all()


def test_options_are_found() -> None:
    assert {"scope": "global"} in list(variants("encoder", "thermometer"))
    assert 2 in fan_ins("dwn")
