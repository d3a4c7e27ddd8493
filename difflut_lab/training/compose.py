"""From what Hydra composed to a checked, plain configuration."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException
from pydantic import Field
from torch import nn

from difflut_lab import schema
from difflut_lab.augmentations import Augmentation
from difflut_lab.errors import ConfigError
from difflut_lab.layers import LayerConfig
from difflut_lab.models import Model
from difflut_lab.registry import REGISTRY, did_you_mean
from difflut_lab.schema import Fraction, PositiveFloat, PositiveInt, Probability, Seed

log = logging.getLogger(__name__)

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings of a run that are not a group's."""

    seed: Seed
    # everything random derives from it, but for the split of the data

    fan_in: PositiveInt
    # inputs per node; node files refer to it

    batch_size: PositiveInt
    # samples per training step (per process)

    eval_batch_size: PositiveInt
    # samples per forward of validation and test

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # share of a training sample's target that is spread over all classes

    ema_decay: Fraction | None = None
    # of an average of the weights over the steps; None keeps none

    ckpt: str | None
    # a last.ckpt to continue from

    kernels: str
    # what computes the ops

    threads: PositiveInt | None
    # CPU threads; None leaves them to torch

    plugins: list[str]
    # modules that register parts

    fast_dev_run: bool
    # one batch of everything


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Learning from the scores of a trained network, beside the labels."""

    ckpt: str | None = None
    # the teacher's checkpoint; None: no teacher

    weight: Probability = 0.5
    # the teacher's share of the loss

    temperature: PositiveFloat = 4.0
    # what the scores of both are divided by


# a run's files have one row, one validation and one checkpoint per epoch
FIXED_TRAINER_OPTIONS = (
    *("max_steps", "min_steps", "max_time", "val_check_interval", "check_val_every_n_epoch"),
    *("enable_checkpointing", "reload_dataloaders_every_n_epochs", "barebones"),
)
SCHEDULES = "schedules"  # the root key of values that change over the epochs
AUGMENTATIONS = "augmentations"  # the root key of changes of the training samples
DISTILLATION = "distillation"  # the root key of a teacher
# what configurations without these keys stand for
NO_RECIPE: Config = {"label_smoothing": 0.0, "ema_decay": None, DISTILLATION: asdict(Distillation())}
MIXED = ("16-mixed", "bf16-mixed")
# weights, and normalised samples, stay in float32
WITHOUT_FLOAT32 = ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16")
LIBRARY_GROUPS = ("optimizer", "scheduler", "trainer", "callbacks", "logger")


def resolve(composed: DictConfig, overrides: Sequence[str]) -> Config:
    """Check a composed configuration and make plain dictionaries of it.

    Parameters
    ----------
    composed : DictConfig
        What Hydra composed, without Hydra's own part.
    overrides : sequence of str
        What the user typed, such as ``["layer.name=learnable_routing"]``.

    Returns
    -------
    dict
        The same tree, interpolations resolved, every part's defaults filled in.

    Raises
    ------
    ConfigError
        Names the full key, the value and what is allowed.
    """
    config = _container(composed)
    typed = {override.split("=", 1)[0].lstrip("+~") for override in overrides}
    for group in ("model", "data"):
        config[group] = _checked_part(group, config.get(group), typed)
    model_class = model_of(config)
    groups = groups_of(model_class)
    _check_roots(config, groups, config["model"]["name"])
    settings = {key: value for key, value in config.items() if key in RunSettings.__dataclass_fields__}
    config |= schema.validate(RunSettings, settings, "")
    for group in groups:
        if group == "layer_config":
            config[group] = schema.validate(LayerConfig, config.get(group) or {}, group)
        else:
            config[group] = _checked_part(group, config.get(group), typed)
    own = {key: value for key, value in config["model"].items() if key != "name"}
    config["model"] |= model_class.resolve(own, {group: config[group] for group in groups})
    _check_library(config)
    config[SCHEDULES] = _checked_schedules(config.get(SCHEDULES) or {}, config["trainer"]["max_epochs"])
    config[AUGMENTATIONS] = _checked_augmentations(config.get(AUGMENTATIONS) or {})
    config[DISTILLATION] = _checked_distillation(config.get(DISTILLATION) or {})
    _check_combinations(config)
    return config


def model_of(config: Mapping[str, Any]) -> type[Model]:
    """The class of the configured model."""
    return REGISTRY.get("model", config["model"]["name"])  # type: ignore[return-value]  # registered parts are callables


def groups_of(model_class: type[Model]) -> list[str]:
    """The configuration groups that a model is assembled from: constructor arguments named like a kind of part."""
    known = {*REGISTRY.kinds(), "layer_config"}
    return [name for name in schema.options(model_class) if name in known]


def build_model(config: Mapping[str, Any], input_shape: Sequence[int], num_classes: int) -> Model:
    """Build the configured model for a data set; the global random state is not touched."""
    model_class = model_of(config)
    declared = schema.options(model_class)
    provided = {"input_shape": tuple(input_shape), "num_classes": num_classes, "seed": config["seed"]}
    provided |= {group: config[group] for group in groups_of(model_class)}
    own = {key: value for key, value in config["model"].items() if key != "name"}
    return model_class(**{key: value for key, value in provided.items() if key in declared}, **own)


def build_augmentations(config: Mapping[str, Any], input_shape: Sequence[int], num_classes: int) -> list[Augmentation]:
    """Build the configured augmentations for samples of a shape, and their classes.

    Raises
    ------
    ConfigError
        If one does not fit them; names its key.
    """
    built = []
    for name, spec in config[AUGMENTATIONS].items():
        declared = schema.options(REGISTRY.get("augmentation", spec["name"]))
        provided = {"input_shape": tuple(input_shape), "num_classes": num_classes}
        provided = {key: value for key, value in provided.items() if key in declared}
        try:
            built.append(REGISTRY.build("augmentation", spec, **provided))
        except ConfigError as error:
            raise ConfigError(f"{AUGMENTATIONS}.{name}: {error}") from None
    return built


def _container(composed: DictConfig) -> Config:
    try:
        container = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (MissingMandatoryValue, InterpolationToMissingValueError) as error:
        raise ConfigError(f"{error.full_key}: must be given.") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _checked_part(group: str, values: Any, typed: set[str]) -> Config:
    """Validate a part; where its name was typed over another part's file, that file's options are dropped."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{group}: must be given, one of {', '.join(REGISTRY.names(group))}.")
    values = dict(values)
    if f"{group}.name" in typed:
        declared = schema.options(REGISTRY.get(group, values["name"], key=f"{group}.name"), REGISTRY.provided(group))
        foreign = [
            key for key in values if key != "name" and key not in declared and not _typed(f"{group}.{key}", typed)
        ]
        for key in foreign:
            del values[key]
        if foreign:
            log.info("%s.name=%s: dropped %s, which it does not have.", group, values["name"], ", ".join(foreign))
    return schema.validate_part(group, values, group)


def _typed(key: str, typed: set[str]) -> bool:
    return any(word == key or word.startswith(f"{key}.") for word in typed)


def _checked_schedules(schedules: Any, max_epochs: int) -> Config:
    """Validate ``schedules.PART.VALUE``; whether the network has such a part and value, the network itself says."""
    if not isinstance(schedules, Mapping):
        raise ConfigError(f"{SCHEDULES}={schedules!r}: must be a mapping, such as {{head: {{tau: ...}}}}.")
    checked: Config = {}
    for kind, values in schedules.items():
        if not isinstance(values, Mapping):
            raise ConfigError(f"{SCHEDULES}.{kind}={values!r}: must be a mapping of values to schedules.")
        for name, spec in values.items():
            spec = schema.validate_part("schedule", spec, f"{SCHEDULES}.{kind}.{name}")
            # written down, because a training that is continued for more epochs would have another course
            spec["epochs"] = max_epochs if spec["epochs"] is None else spec["epochs"]
            checked.setdefault(str(kind), {})[str(name)] = spec
    return checked


def _checked_augmentations(augmentations: Any) -> Config:
    """Validate ``augmentations.NAME``; whether they fit the samples, they say themselves."""
    if not isinstance(augmentations, Mapping):
        raise ConfigError(f"{AUGMENTATIONS}={augmentations!r}: must be a mapping, such as {{crop: random_crop}}.")
    return {
        str(name): schema.validate_part("augmentation", spec, f"{AUGMENTATIONS}.{name}")
        for name, spec in augmentations.items()
    }


def _checked_distillation(distillation: Any) -> Config:
    if not isinstance(distillation, Mapping):
        raise ConfigError(f"{DISTILLATION}={distillation!r}: must be a mapping, such as {{ckpt: teacher/best.ckpt}}.")
    checked = schema.validate(Distillation, distillation, DISTILLATION)
    for key, default in asdict(Distillation()).items():
        if checked["ckpt"] is None and checked[key] != default:
            raise ConfigError(
                f"{DISTILLATION}.{key}={checked[key]}: there is no teacher; name one by {DISTILLATION}.ckpt."
            )
    return checked


def _check_roots(config: Config, groups: Sequence[str], model: str) -> None:
    known = [*RunSettings.__dataclass_fields__, SCHEDULES, AUGMENTATIONS, DISTILLATION]
    known += ["model", "data", *groups, *LIBRARY_GROUPS]
    for key in config:
        if key not in known:
            used = f" model={model} does not use it." if key in (*REGISTRY.kinds(), "layer_config") else ""
            raise ConfigError(
                f"Unknown key '{key}' (value {config[key]!r}).{used}{did_you_mean(key, known)} "
                f"Allowed keys: {', '.join(known)}."
            )


def _check_library(config: Config) -> None:
    for group, provided in (
        ("optimizer", ("params",)),
        ("scheduler", ("optimizer", "steps_per_epoch")),
        ("trainer", ()),
    ):
        if config.get(group):
            schema.validate_target(config[group], group, provided)
    for group in ("callbacks", "logger"):
        for name, values in (config.get(group) or {}).items():
            if not isinstance(values, Mapping):
                raise ConfigError(f"{group}.{name}={values!r}: must be a mapping with a _target_.")
            schema.validate_target(values, f"{group}.{name}", ("save_dir", "config", "overrides", "sweep"))
    # built once on nothing, so that what their own checks refuse is refused before data is read
    optimizer = instantiate(config["optimizer"], "optimizer", [nn.Parameter(torch.zeros(1))])
    if config.get("scheduler"):
        instantiate(config["scheduler"], "scheduler", optimizer, steps_per_epoch=1)
    trainer = config["trainer"]
    for key in ("logger", "callbacks", "default_root_dir", "fast_dev_run"):
        if key in trainer:
            raise ConfigError(f"trainer.{key}: is set by the framework; use the group or key of that name.")
    for key in FIXED_TRAINER_OPTIONS:
        if key in trainer:
            raise ConfigError(
                f"trainer.{key}={trainer[key]}: cannot be set; every epoch is trained whole, validated and saved once."
            )
    if trainer.get("precision") in WITHOUT_FLOAT32:
        raise ConfigError(f"trainer.precision={trainer['precision']}: must be 32-true, 64-true, {' or '.join(MIXED)}.")
    if trainer.get("limit_val_batches") == 0:
        raise ConfigError("trainer.limit_val_batches=0: there must be a validation, which chooses the best checkpoint.")
    epochs = trainer.get("max_epochs")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ConfigError(f"trainer.max_epochs={epochs}: must be a whole number, at least 1.")


def _check_combinations(config: Config) -> None:
    """Settings that are each allowed, but not together."""
    layer_configs = {"layer_config": config.get("layer_config") or {}}
    for index, overlay in (config["model"].get("per_layer") or {}).items():
        layer_configs[f"model.per_layer.{index}.layer_config"] = overlay.get("layer_config") or {}
    for key, values in layer_configs.items():
        mode = values.get("grad_stabilization", "none")
        if config["trainer"].get("precision") in ("16-mixed", 16, "16") and mode != "none":
            raise ConfigError(
                f"trainer.precision={config['trainer']['precision']} scales the loss, which "
                f"{key}.grad_stabilization={mode} would undo: use trainer.precision=bf16-mixed or 32-true."
            )
    trainer, precision = config["trainer"], str(config["trainer"].get("precision"))
    if config["optimizer"].get("fused") and trainer.get("gradient_clip_val") and precision in ("16", *MIXED):
        raise ConfigError(
            f"trainer.gradient_clip_val={trainer['gradient_clip_val']}: with trainer.precision={precision}, a fused "
            "optimizer leaves no gradients to clip: set optimizer.fused=false."
        )


def instantiate(values: Mapping[str, Any], key: str, *arguments: Any, **provided: Any) -> Any:
    """Build a library part from its ``_target_``; those of ``provided`` that it declares are handed to it.

    Raises
    ------
    ConfigError
        If the part refuses its options.
    """
    target = schema.locate(values["_target_"], f"{key}._target_")
    declared = schema.options(target)
    options = {name: value for name, value in values.items() if name != "_target_"}
    options |= {name: value for name, value in provided.items() if name in declared}
    try:
        return target(*arguments, **options)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"{key}: {error}") from error
