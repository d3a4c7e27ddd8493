import logging
import re

import pytest
from omegaconf import OmegaConf

from difflut_lab import schema
from difflut_lab.errors import ConfigError
from difflut_lab.registry import REGISTRY
from difflut_lab.training.compose import resolve
from difflut_lab.training.paths import config_directory

FILES = sorted(
    (path.parent.name, path.stem)
    for path in config_directory().glob("*/*.yaml")
    if path.parent.name not in ("experiment",)
)
EXPERIMENTS = sorted(path.stem for path in (config_directory() / "experiment").glob("*.yaml"))
NEEDED = {("data", "npz"): ["data.path=somewhere.npz"]}  # mandatory values


@pytest.mark.parametrize(("group", "name"), FILES)
def test_every_file_composes_and_every_word_of_it_is_known(composed, group, name):
    words = [f"{group}={name}", *NEEDED.get((group, name), [])]
    if group == "quantizer":
        words.append("model=ternary_mlp")
    if group == "schedule":
        words = [f"+schedule@schedules.head.tau={name}", "schedules.head.tau.end=3"]
    if group == "augmentation":
        words = [f"+augmentation@augmentations.mine={name}"]
    config = resolve(composed(*words), words)
    if group == "schedule":
        assert config["schedules"]["head"]["tau"] == {"name": name, "end": 3.0, "start": None, "epochs": 40}
    elif group == "augmentation":
        assert config["augmentations"]["mine"]["name"] == name
    elif group in REGISTRY.kinds():
        assert config[group]["name"] == name, "a file's name is the registered name it selects"


@pytest.mark.parametrize("kind", [kind for kind in REGISTRY.kinds() if (config_directory() / kind).is_dir()])
def test_every_registered_part_has_a_file_that_shows_all_its_options(composed, kind):
    for name in REGISTRY.names(kind):
        content = OmegaConf.load(config_directory() / kind / f"{name}.yaml")
        values = content.model if kind == "model" else content
        declared = schema.options(REGISTRY.get(kind, name), REGISTRY.provided(kind))
        assert set(values) - {"name"} == set(declared), f"configs/{kind}/{name}.yaml"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(composed, name):
    words = [f"experiment={name}"]
    resolve(composed(*words), words)


BAD_INPUT = [
    (
        ["layer.name=random_ruting"],
        "Unknown layer 'random_ruting' (layer.name=random_ruting). Did you mean 'random_routing'?",
    ),
    (["layer_config.flip_probability=1.5"], "layer_config.flip_probability=1.5: must be at least 0 and at most 1."),
    (
        ["model=ternary_mlp", "model.activation_bits=4"],
        "model.activation_bits=4: must be one of 8, null.",
    ),
    (
        ["layer_config.grad_stabilization=layerwize"],
        "layer_config.grad_stabilization=layerwize: must be one of none, layerwise, nodewise, batch",
    ),
    (
        ["+layer_config.flip_prob=0.1"],
        "Unknown key 'layer_config.flip_prob' (value 0.1). Did you mean 'layer_config.flip_probability'?",
    ),
    (["node.n=0"], "node.n=0: "),
    (["node.n=20"], "node.n=20: "),
    (["model.widths=[]"], "model.widths=[]: "),
    (
        ["+model.per_layer.7.layer.name=random_routing"],
        "model.per_layer.7: there is no such layer; model.widths=[1000, 500] has layers 0 to 1.",
    ),
    (["+model.per_layer.0.layr.name=random_routing"], "Unknown key 'model.per_layer.0.layr'"),
    (["+model.per_layer.0.layer.candidates=16"], "Unknown key 'model.per_layer.0.layer.candidates'"),
    (["+model.per_layer.0.layer_config.flip_probability=2"], "model.per_layer.0.layer_config.flip_probability=2"),
    (["+foo=1"], "Unknown key 'foo' (value 1)."),
    (["+sed=1"], "Unknown key 'sed' (value 1). Did you mean 'seed'?"),
    (["+quantizer.name=twn"], "Unknown key 'quantizer'"),
    (["batch_size=0"], "batch_size=0: must be at least 1."),
    (["seed=-1"], "seed=-1: must be at least 0"),
    (["+optimizer.lrr=1"], "Unknown key 'optimizer.lrr'"),
    (["optimizer.lr=-1"], "optimizer: Invalid learning rate: -1"),
    (["trainer.max_epochs=0"], "trainer.max_epochs=0: must be a whole number, at least 1."),
    (["+trainer.max_epoch=0"], "Unknown key 'trainer.max_epoch'"),
    (
        ["logger.wandb.mode=onlin"],
        "logger.wandb.mode=onlin: must be one of offline, online, disabled. Did you mean 'online'?",
    ),
    (
        ["+logger.wandb.projekt=x"],
        "Unknown key 'logger.wandb.projekt' (value 'x'). Did you mean 'logger.wandb.project'?",
    ),
    (["data=npz"], "data.path: must be given."),
    (["+trainer.max_steps=5"], "trainer.max_steps=5: cannot be set"),
    (["+trainer.limit_val_batches=0"], "trainer.limit_val_batches=0: there must be a validation"),
    (
        ["trainer.precision=16-mixed", "layer_config.grad_stabilization=nodewise"],
        "trainer.precision=16-mixed scales the loss",
    ),
    (
        ["trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1", "optimizer=adam"],
        "trainer.gradient_clip_val=1: with trainer.precision=bf16-mixed, a fused optimizer leaves no gradients",
    ),
    (["layer.name=learnable_routing", "+layer.candidats=3"], "Unknown key 'layer.candidats'"),
    (["node.initializer=norml"], "Unknown initializer 'norml'"),
]


@pytest.mark.parametrize(("words", "message"), BAD_INPUT)
def test_bad_input_is_one_line_that_names_key_value_and_choices(composed, words, message):
    with pytest.raises(ConfigError) as error:
        resolve(composed(*words), words)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_kernels_that_do_not_exist_are_named(train):
    with pytest.raises(
        ConfigError, match=r"^kernels=cuda: there is no such backend\. Backends: auto, reference, cpu, triton"
    ):
        train("kernels=cuda")


def test_bf16_goes_with_gradient_stabilization(composed):
    words = ["trainer.precision=bf16-mixed", "layer_config.grad_stabilization=nodewise"]
    assert resolve(composed(*words), words)["trainer"]["precision"] == "bf16-mixed"


def test_a_name_typed_over_another_part_drops_that_parts_options(composed, caplog):
    words = ["layer=learnable_routing", "layer.name=random_routing"]
    with caplog.at_level(logging.INFO):
        assert resolve(composed(*words), words)["layer"] == {"name": "random_routing"}
    assert "layer.name=random_routing: dropped candidates, tau" in caplog.text
    words.append("layer.candidates=8")
    with pytest.raises(ConfigError, match=r"Unknown key 'layer\.candidates'"):
        resolve(composed(*words), words)


def test_per_layer_settings_are_laid_over_the_groups(composed):
    words = [
        "layer=learnable_routing",
        "layer.candidates=8",
        "+model.per_layer.0.layer.candidates=16",
        "+model.per_layer.1.layer=random_routing",
        "+model.per_layer.1.node.n=4",
    ]
    config = resolve(composed(*words), words)
    assert config["model"]["per_layer"][0] == {"layer": {"candidates": 16}}
    words = ["model.widths=[30]", "+model.per_layer.1.node.n=4"]
    with pytest.raises(ConfigError, match=re.escape("model.per_layer.1: there is no such layer")):
        resolve(composed(*words), words)


def test_fan_in_reaches_the_nodes_unless_they_say_otherwise(composed):
    assert resolve(composed("fan_in=4"), ["fan_in=4"])["node"]["n"] == 4
    assert resolve(composed("fan_in=4", "node.n=3"), [])["node"]["n"] == 3
