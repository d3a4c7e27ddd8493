"""A part under test: how it is built, and how to say what is wrong with it."""

from __future__ import annotations

import dataclasses
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from difflut_lab import schema
from difflut_lab.errors import ConfigError, UserError
from difflut_lab.registry import REGISTRY
from difflut_lab.seeding import generator


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A part, registered or not, with the arguments that it is built with."""

    kind: str
    # the kind of part, as the registry names it

    label: str
    # what messages call it: its registered name, or the name of its class

    target: Callable[..., Any]
    # the class

    provided: Mapping[str, Any]
    # what the framework hands to parts of this kind

    options: Mapping[str, Any]
    # what a configuration would say, checked and complete

    @classmethod
    def of(
        cls, kind: str, part: str | Callable[..., Any], provided: Mapping[str, Any], given: Mapping[str, Any]
    ) -> Subject:
        """The part of a name or class, with its options checked as those of a configuration are.

        Parameters
        ----------
        kind : str
            The kind of part.
        part : str or callable
            Its registered name, or a class.
        provided : mapping
            What the framework hands to parts of this kind.
        given : mapping
            Options; and what the framework hands to some, such as the bits per feature of a layer that asks for them.

        Raises
        ------
        ConfigError
            If there is no part of that name, or an option is refused.
        """
        target = REGISTRY.get(kind, part) if isinstance(part, str) else part
        label = part if isinstance(part, str) else getattr(part, "__name__", repr(part))
        provided = dict(provided) | {name: given[name] for name in REGISTRY.provided(kind) if name in given}
        options = {name: value for name, value in given.items() if name not in provided}
        subject = cls(kind=kind, label=label, target=target, provided=provided, options=options)
        subject._check_declarations()
        checked = schema.validate(target, options, kind, REGISTRY.provided(kind))
        subject._check_defaults()
        return dataclasses.replace(subject, options=checked)

    def asks_for(self, name: str) -> bool:
        """Whether the constructor declares something that only those parts get that do."""
        return name in schema.options(self.target)

    def providing(self, **more: Any) -> Subject:
        """The same part, handed more by the framework."""
        return dataclasses.replace(self, provided=dict(self.provided) | more)

    def fail(self, message: str) -> NoReturn:
        """Raise the message, the part named before it."""
        raise AssertionError(f"{self.kind} '{self.label}': {message}")

    def require(self, condition: bool | Tensor, message: str) -> None:
        """Raise the message unless the condition holds."""
        if not condition:
            self.fail(message)

    def build(self, **changes: Any) -> Any:
        """Build the part anew, with some arguments changed."""
        arguments = dict(self.provided) | dict(self.options) | changes
        with self.doing(f"building it, as the framework does, with the keywords {', '.join(arguments)}"):
            return self.target(**arguments)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Whatever the part does within this context: errors say what it was, global random states are watched."""
        before = _random_states()
        try:
            yield
        except (AssertionError, UserError):
            raise
        except Exception as error:
            raise AssertionError(
                f"{self.kind} '{self.label}': {what} raised {type(error).__name__}: {error}"
            ) from error
        after = _random_states()
        for library, state in before.items():
            self.require(
                np.array_equal(state, after[library]),
                f"{what} draws from the global random state of {library}, so that runs depend on what ran before them. "
                'Draw from a generator of its own, difflut_lab.seeding.generator(self.seed, "purpose").',
            )

    def check_unknown_option(self) -> None:
        """An option that it does not have must be refused when it is built by hand, too."""
        try:
            self.target(**(dict(self.provided) | dict(self.options) | {"no_such_option": 1}))
        except (TypeError, ConfigError):
            return
        self.fail(
            "the unknown option no_such_option=1 was accepted. Nothing may be ignored silently: hand **kwargs on to "
            "super().__init__, or do not take them."
        )

    @property
    def _declared(self) -> dict[str, inspect.Parameter]:
        return schema.options(self.target, REGISTRY.provided(self.kind))

    def _check_declarations(self) -> None:
        for name, parameter in self._declared.items():
            self.require(
                parameter.annotation is not inspect.Parameter.empty,
                f"the option '{name}' has no annotation, so that no value of {self.kind}.{name} would be refused. "
                f"Annotate it in __init__, for example {name}: PositiveInt, from difflut_lab.schema.",
            )
            self.require(
                parameter.default is inspect.Parameter.empty or _is_plain(parameter.default),
                f"the default {parameter.default!r} of the option '{name}' cannot be written in YAML. Take a number, a "
                "word, a boolean, None, or lists and dicts of them, and make of it in __init__ what is needed.",
            )

    def _check_defaults(self) -> None:
        """Defaults must pass the checks of their own options; what was given has passed already."""
        defaults = {
            name: self.options.get(name) if parameter.default is inspect.Parameter.empty else parameter.default
            for name, parameter in self._declared.items()
        }
        try:
            schema.validate(self.target, defaults, self.kind, REGISTRY.provided(self.kind))
        except ConfigError as error:
            self.fail(f"a default does not pass the check of its own option: {error}")


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers in [0, 1) that do not touch the global random state."""
    return torch.rand(*shape, generator=generator(seed, "uniform")).to(dtype)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that do not touch the global random state."""
    return torch.randn(*shape, generator=generator(seed, "normal"))


def bits(*shape: int, seed: int = 0) -> Tensor:
    """Bits that do not touch the global random state."""
    return torch.randint(2, shape, generator=generator(seed, "bits")).float()


def only_bits(values: Tensor) -> bool:
    """Whether all values are 0 or 1."""
    return bool(((values == 0) | (values == 1)).all())


def shape_of(values: Any) -> str:
    """The shape of a tensor, or what there is in its place, for messages."""
    return str(tuple(values.shape)) if isinstance(values, Tensor) else type(values).__name__


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str | int) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(entry) for entry in value)
    return value is None or isinstance(value, bool | int | float | str)


def _random_states() -> dict[str, np.ndarray]:
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002  it is watched, not used
    states = {
        "torch": torch.random.get_rng_state().numpy(),
        "numpy": np.append(legacy["state"]["key"], legacy["state"]["pos"]),
        "Python": np.array(random.getstate()[1]),
    }
    if torch.cuda.is_initialized():
        states["torch.cuda"] = torch.cuda.get_rng_state().numpy()
    return states
