"""Checks a composed configuration against what each part declares.

A part's options are the annotated keyword parameters of its ``__init__``; ranges are written as
``Annotated[float, Field(ge=0, le=1)]``. This module knows the mechanism, not the keys: a user's own part is checked
like a built-in one.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from difflut_lab.errors import ConfigError
from difflut_lab.registry import REGISTRY, did_you_mean

Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


@dataclass(frozen=True)
class PartOf:
    """Marks an option that names another registered part: ``Annotated[str | dict, PartOf("initializer")]``."""

    kind: str


def options(target: Callable[..., Any], provided: Iterable[str] = ()) -> dict[str, inspect.Parameter]:
    """The keyword parameters of a class or function, annotations evaluated.

    A ``**kwargs`` is followed to the base class, which is where it goes.

    Parameters
    ----------
    target : callable
        A class or function.
    provided : iterable of str
        Names to leave out, because the framework supplies them.
    """
    found: dict[str, inspect.Parameter] = {}
    left_out = {"self", *provided}
    for function in _constructors(target):
        parameters = inspect.signature(function).parameters
        for name, parameter in parameters.items():
            if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                continue
            if name not in left_out and name not in found:
                found[name] = parameter.replace(annotation=_evaluate(parameter.annotation, function))
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return found


def defaults(kind: str, name: str) -> dict[str, Any]:
    """The configuration that a registered part's signature stands for: its name and its options' defaults."""
    declared = options(REGISTRY.get(kind, name), REGISTRY.provided(kind))
    missing = "???"  # OmegaConf's mark of a mandatory value
    return {"name": name} | {
        key: missing if parameter.default is inspect.Parameter.empty else parameter.default
        for key, parameter in declared.items()
    }


def validate_part(kind: str, values: str | Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Check a part's name and options.

    Parameters
    ----------
    kind : str
        The kind of the part.
    values : str or mapping
        The part's name, or a mapping of ``name`` and options.
    prefix : str
        The full key of the part, such as ``"layer"`` or ``"model.per_layer.0.layer"``.

    Returns
    -------
    dict
        ``name`` and every option, defaults filled in.

    Raises
    ------
    ConfigError
        Names the full key, its value and what is allowed.
    """
    if isinstance(values, str):
        values = {"name": values}
    if not isinstance(values, Mapping) or "name" not in values:
        raise ConfigError(
            f"{prefix}={values!r}: must name a {kind}, one of {', '.join(REGISTRY.names(kind))} "
            f"(as {prefix}.name, with its options beside it)."
        )
    name = values["name"]
    target = REGISTRY.get(kind, name, key=f"{prefix}.name")
    given = {key: value for key, value in values.items() if key != "name"}
    return {"name": name} | validate(target, given, prefix, provided=REGISTRY.provided(kind))


def validate(
    target: Callable[..., Any], values: Mapping[str, Any], prefix: str, provided: Iterable[str] = ()
) -> dict[str, Any]:
    """Check values against the keyword parameters of a class or function.

    Returns
    -------
    dict
        Every option, defaults filled in and values converted.

    Raises
    ------
    ConfigError
        On an unknown or missing key, a wrong type or choice, a value out of range, NaN or infinity.
    """
    declared = options(target, provided)
    plain = {key: parameter for key, parameter in declared.items() if _part_of(parameter.annotation) is None}
    for key in values:
        if key not in declared:
            allowed = ", ".join(_join(prefix, known) for known in declared) or "none"
            suggestion = did_you_mean(key, declared, _join(prefix, ""))
            raise ConfigError(
                f"Unknown key '{_join(prefix, key)}' (value {values[key]!r}).{suggestion} Allowed keys: {allowed}."
            )
    for key, parameter in plain.items():
        if isinstance(values.get(key), bool) and not _accepts_bool(parameter.annotation):
            raise ConfigError(f"{_join(prefix, key)}={values[key]}: must be a number, not a boolean.")
    checked = _checked(plain, {key: value for key, value in values.items() if key in plain}, prefix)
    result = {key: getattr(checked, key) for key in plain}
    for key, parameter in declared.items():
        kind = _part_of(parameter.annotation)
        if kind is not None:
            value = values.get(key, parameter.default)
            optional = type(None) in typing.get_args(typing.get_args(parameter.annotation)[0])
            result[key] = None if value is None and optional else validate_part(kind, value, _join(prefix, key))
    return {key: result[key] for key in declared}


def check_values(annotation: Any, values: Mapping[str, Any], prefix: str) -> None:
    """Check values that will each take the place of an option's value.

    Parameters
    ----------
    annotation : type
        The option's annotation.
    values : mapping
        By the keys, below ``prefix``, that errors shall name.
    prefix : str
        Where those keys are.

    Raises
    ------
    ConfigError
        On a wrong type or choice, a value out of range, NaN or infinity.
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    _checked({key: inspect.Parameter(key, keyword, annotation=annotation) for key in values}, values, prefix)


def validate_target(values: Mapping[str, Any], prefix: str, provided: Iterable[str] = ()) -> None:
    """Check a library part, named by ``_target_``: that it imports and takes the keys it is given.

    Raises
    ------
    ConfigError
        If the target does not import, a key is not one of its parameters, or a value is NaN.
    """
    path = values.get("_target_")
    if not isinstance(path, str):
        raise ConfigError(f"{prefix}: needs a _target_, the import path of a class.")
    target = locate(path, f"{prefix}._target_")
    if target.__module__.partition(".")[0] == __package__:
        # our own functions declare types and ranges; most libraries' annotations are not precise enough to check
        validate(target, {key: value for key, value in values.items() if key != "_target_"}, prefix, provided)
        return
    declared = options(target, provided)
    takes_any = any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD
        for function in _constructors(target)
        for parameter in inspect.signature(function).parameters.values()
    )
    for key, value in values.items():
        if key.startswith("_"):
            continue
        if key not in declared and not takes_any:
            suggestion = did_you_mean(key, declared, _join(prefix, ""))
            raise ConfigError(
                f"Unknown key '{_join(prefix, key)}' (value {value!r}): {path} has no such parameter.{suggestion} "
                f"Allowed keys: {', '.join(_join(prefix, known) for known in declared)}."
            )
        if isinstance(value, float) and math.isnan(value):
            raise ConfigError(f"{_join(prefix, key)}=nan: must be a number.")


def locate(path: str, key: str) -> Callable[..., Any]:
    """Import the object at a dotted path.

    Raises
    ------
    ConfigError
        If there is none; names the configuration key that asked for it.
    """
    module, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}={path}: cannot be imported ({error}).") from None
    if not callable(found):
        raise ConfigError(f"{key}={path}: is not a class or function.")
    return typing.cast(Callable[..., Any], found)


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else str(key)


def _constructors(target: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The functions that receive the keyword arguments, nearest first."""
    if not isinstance(target, type):
        return [target]
    return [base.__dict__["__init__"] for base in target.__mro__[:-1] if "__init__" in base.__dict__]


def _evaluate(annotation: Any, function: Callable[..., Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    module = sys.modules.get(function.__module__)
    try:
        return eval(annotation, getattr(function, "__globals__", vars(module) if module else {}))
    except (NameError, AttributeError):
        return Any  # a name imported for type checkers only


def _part_of(annotation: Any) -> str | None:
    if typing.get_origin(annotation) is Annotated:
        for mark in typing.get_args(annotation)[1:]:
            if isinstance(mark, PartOf):
                return mark.kind
    return None


def _accepts_bool(annotation: Any) -> bool:
    if annotation in (inspect.Parameter.empty, Any, bool):
        return True
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _accepts_bool(typing.get_args(annotation)[0])
    if origin is Literal:
        return any(isinstance(choice, bool) for choice in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return any(_accepts_bool(choice) for choice in typing.get_args(annotation))
    # other types refuse a boolean by themselves, with a message of their own
    return annotation not in (int, float)


def _bounds(marks: Iterable[Any]) -> list[str]:
    """The bounds that an annotation states, in words."""
    words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
    found = []
    for mark in marks:
        found += _bounds(getattr(mark, "metadata", ()))  # pydantic's Field holds several
        found += [f"{word} {getattr(mark, name)}" for name, word in words.items() if hasattr(mark, name)]
    return found


def _checked(declared: Mapping[str, inspect.Parameter], values: Mapping[str, Any], prefix: str) -> pydantic.BaseModel:
    fields: dict[str, Any] = {
        key: (
            Any if parameter.annotation is inspect.Parameter.empty else parameter.annotation,
            ... if parameter.default is inspect.Parameter.empty else parameter.default,
        )
        for key, parameter in declared.items()
    }
    model = pydantic.create_model(
        "Options",
        __config__=pydantic.ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=()),
        **fields,
    )
    try:
        return model.model_validate(dict(values))
    except pydantic.ValidationError as error:
        lines = [_sentence(problem, declared, prefix) for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _sentence(problem: Any, declared: Mapping[str, inspect.Parameter], prefix: str) -> str:
    """One line for one of pydantic's errors: the full key, the value, what is allowed."""
    # below the option itself, pydantic's location names members of a union: of use to nobody
    location = [str(problem["loc"][0]), *(str(part) for part in problem["loc"][1:] if isinstance(part, int))]
    key = _join(prefix, ".".join(location))
    if problem["type"] == "missing":
        return f"{key}: must be given."
    value = problem["input"]
    shown = value if isinstance(value, str | int | float) else repr(value)
    annotation = declared[location[0]].annotation
    if problem["type"] == "literal_error":
        choices = _choices(annotation)
        return f"{key}={shown}: must be one of {', '.join(choices)}.{did_you_mean(str(value), choices)}"
    if problem["type"] in ("greater_than", "greater_than_equal", "less_than", "less_than_equal") and len(location) == 1:
        bounds = _bounds(typing.get_args(annotation)[1:])
        if bounds:
            return f"{key}={shown}: must be {' and '.join(bounds)}."
    if problem["type"] == "too_short":
        return f"{key}={shown}: must have at least {problem['ctx']['min_length']} element(s)."
    message = problem["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be").replace("Input should have", "must have")
    return f"{key}={shown}: {message}."


def _choices(annotation: Any) -> list[str]:
    """The values that an annotation lists, as they are written in YAML."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _choices(members[0])
    if origin is Literal:
        return [str(choice) for choice in members]
    if origin in (typing.Union, types.UnionType):
        return [choice for member in members for choice in _choices(member)]
    return ["null"] if annotation is type(None) else []
