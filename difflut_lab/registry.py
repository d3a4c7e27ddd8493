"""One registry for every part that a configuration can name.

A part is a class registered under a kind and a name; the name is also the YAML file's name and the name in tables
and checkpoints. The built-in parts of a kind are imported the first time that kind is looked up.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from difflut_lab.errors import ConfigError

Part = TypeVar("Part", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the registry knows of one kind of part."""

    package: str
    # the package that registers the built-in parts

    plural: str
    # the word for several of them, in messages

    provided: frozenset[str] = frozenset()
    # constructor arguments that the framework supplies: never options in YAML


KINDS: dict[str, Kind] = {
    "layer": Kind(
        package="difflut_lab.layers",
        plural="layers",
        provided=frozenset(
            {"input_size", "output_size", "node_type", "n", "node_kwargs", "layer_config", "seed"}
            | {"bits_per_feature", "input_shape"}
        ),
    ),
    "node": Kind(package="difflut_lab.nodes", plural="nodes", provided=frozenset({"num_nodes", "seed"})),
    "encoder": Kind(
        package="difflut_lab.encoders", plural="encoders", provided=frozenset({"input_size", "input_shape"})
    ),
    "head": Kind(
        package="difflut_lab.heads", plural="heads", provided=frozenset({"input_size", "num_classes", "seed"})
    ),
    "model": Kind(
        package="difflut_lab.models",
        plural="models",
        provided=frozenset(
            {"input_shape", "num_classes", "encoder", "layer", "node", "head", "quantizer", "layer_config", "seed"},
        ),
    ),
    "data": Kind(package="difflut_lab.data", plural="data sets"),
    "augmentation": Kind(
        package="difflut_lab.augmentations",
        plural="augmentations",
        provided=frozenset({"input_shape", "num_classes"}),
    ),
    "initializer": Kind(package="difflut_lab.nodes.initializers", plural="initializers"),
    "regularizer": Kind(package="difflut_lab.nodes.regularizers", plural="regularizers"),
    "schedule": Kind(package="difflut_lab.schedules", plural="schedules"),
    "quantizer": Kind(package="difflut_lab.ternary.quantizers", plural="quantizers"),
    "ternary": Kind(
        package="difflut_lab.ternary", plural="ternary layers", provided=frozenset({"layer_config", "seed"})
    ),
}


def did_you_mean(word: str, choices: Iterable[str], prefix: str = "") -> str:
    """A sentence that suggests the nearest of the choices, ``prefix`` put before it, or an empty string."""
    nearest = difflib.get_close_matches(str(word), list(choices), n=1)
    return f" Did you mean '{prefix}{nearest[0]}'?" if nearest else ""


class Registry:
    """Names to classes, one table per kind."""

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self._kinds = kinds
        self._parts: dict[str, dict[str, Callable[..., Any]]] = {kind: {} for kind in kinds}

    def register(self, kind: str, name: str) -> Callable[[Part], Part]:
        """Decorator that registers a part.

        Parameters
        ----------
        kind : str
            ``"layer"``, ``"node"``, ``"encoder"``, ... (see ``KINDS``).
        name : str
            The name that YAML and the command line use.

        Raises
        ------
        ConfigError
            If the name is taken by another class.
        """

        def add(part: Part) -> Part:
            parts = self._parts[kind]
            taken = parts.get(name)
            # a module imported anew (a reload, a plugin run as a script) replaces its own parts
            if taken is not None and _identity(taken) != _identity(part):
                raise ConfigError(f"{kind} '{name}' is already registered, by {_identity(taken)}; choose another name.")
            parts[name] = part
            return part

        return add

    def names(self, kind: str) -> list[str]:
        """The registered names of a kind, sorted."""
        return sorted(self._loaded(kind))

    def get(self, kind: str, name: str, *, key: str | None = None) -> Callable[..., Any]:
        """The class registered under a name.

        Parameters
        ----------
        kind, name : str
            As given to ``register``.
        key : str, optional
            The configuration key that holds the name, for the message.

        Raises
        ------
        ConfigError
            If there is none; the message suggests the nearest name and lists all.
        """
        parts = self._loaded(kind)
        if name not in parts:
            where = f" ({key}={name})" if key else ""
            raise ConfigError(
                f"Unknown {kind} '{name}'{where}.{did_you_mean(name, parts)} "
                f"Registered {self._kinds[kind].plural}: {', '.join(sorted(parts))}."
            )
        return parts[name]

    def build(self, kind: str, spec: str | Mapping[str, Any], **provided: Any) -> Any:
        """Build a part from its name, or from a mapping of ``name`` and options."""
        options = {"name": spec} if isinstance(spec, str) else dict(spec)
        return self.get(kind, options.pop("name"))(**provided, **options)

    def provided(self, kind: str) -> frozenset[str]:
        """Constructor arguments that the framework supplies to parts of this kind."""
        return self._kinds[kind].provided

    def kinds(self) -> list[str]:
        """All kinds of parts."""
        return list(self._kinds)

    def get_layer(self, name: str) -> Callable[..., Any]:
        """The layer class registered under a name."""
        return self.get("layer", name)

    def get_node(self, name: str) -> Callable[..., Any]:
        """The class of a bank of nodes registered under a name."""
        return self.get("node", name)

    def get_encoder(self, name: str) -> Callable[..., Any]:
        """The encoder class registered under a name."""
        return self.get("encoder", name)

    def get_head(self, name: str) -> Callable[..., Any]:
        """The head class registered under a name."""
        return self.get("head", name)

    def get_model(self, name: str) -> Callable[..., Any]:
        """The model class registered under a name."""
        return self.get("model", name)

    def get_data(self, name: str) -> Callable[..., Any]:
        """The data set class registered under a name."""
        return self.get("data", name)

    def _loaded(self, kind: str) -> dict[str, Callable[..., Any]]:
        if kind not in self._kinds:
            raise ConfigError(f"Unknown kind of part '{kind}'. Kinds: {', '.join(self._kinds)}.")
        importlib.import_module(self._kinds[kind].package)
        return self._parts[kind]


def _identity(part: Callable[..., Any]) -> str:
    return f"{part.__module__}.{part.__qualname__}"


REGISTRY = Registry(KINDS)


def register_layer(name: str) -> Callable[[Part], Part]:
    """Register a layer class: ``@register_layer("my_layer")``."""
    return REGISTRY.register("layer", name)


def register_node(name: str) -> Callable[[Part], Part]:
    """Register a bank of nodes: ``@register_node("my_node")``."""
    return REGISTRY.register("node", name)


def register_encoder(name: str) -> Callable[[Part], Part]:
    """Register an encoder class: ``@register_encoder("my_encoder")``."""
    return REGISTRY.register("encoder", name)


def register_head(name: str) -> Callable[[Part], Part]:
    """Register a head class: ``@register_head("my_head")``."""
    return REGISTRY.register("head", name)


def register_model(name: str) -> Callable[[Part], Part]:
    """Register a model class: ``@register_model("my_model")``."""
    return REGISTRY.register("model", name)


def register_data(name: str) -> Callable[[Part], Part]:
    """Register a data set class: ``@register_data("my_data")``."""
    return REGISTRY.register("data", name)


def register_augmentation(name: str) -> Callable[[Part], Part]:
    """Register an augmentation of training samples: ``@register_augmentation("my_augmentation")``."""
    return REGISTRY.register("augmentation", name)


def register_initializer(name: str) -> Callable[[Part], Part]:
    """Register an initialiser of tables: ``@register_initializer("my_initializer")``."""
    return REGISTRY.register("initializer", name)


def register_regularizer(name: str) -> Callable[[Part], Part]:
    """Register a penalty on a bank's parameters: ``@register_regularizer("my_regularizer")``."""
    return REGISTRY.register("regularizer", name)


def register_schedule(name: str) -> Callable[[Part], Part]:
    """Register a schedule of values: ``@register_schedule("my_schedule")``."""
    return REGISTRY.register("schedule", name)


def register_quantizer(name: str) -> Callable[[Part], Part]:
    """Register a quantizer of weights: ``@register_quantizer("my_quantizer")``."""
    return REGISTRY.register("quantizer", name)


def register_ternary(name: str) -> Callable[[Part], Part]:
    """Register a ternary layer: ``@register_ternary("my_layer")``."""
    return REGISTRY.register("ternary", name)
