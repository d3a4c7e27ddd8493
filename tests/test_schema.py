import math
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from difflut_lab import schema
from difflut_lab.errors import ConfigError
from difflut_lab.schema import PartOf, PositiveInt, Probability


class Base:
    def __init__(self, size: int, n: Annotated[int, Field(ge=1, le=12)] = 6, seed: int = 42) -> None: ...


class Part(Base):
    def __init__(
        self,
        *args: Any,
        probability: Probability = 0.0,
        mode: Literal["none", "layerwise"] = "none",
        widths: Annotated[list[PositiveInt], Field(min_length=1)] | None = None,
        initializer: Annotated[str | dict[str, Any], PartOf("initializer")] = "normal",
        flag: bool = False,
        foo=5,
        **kwargs: Any,
    ) -> None: ...


class WithoutBase(Base):
    def __init__(self, own: int = 1) -> None: ...


def check(**values: Any) -> dict[str, Any]:
    return schema.validate(Part, values, "part", provided={"size", "seed"})


def test_options_follow_kwargs_to_the_base_class_and_leave_out_what_is_provided():
    assert list(schema.options(Part, {"size", "seed"})) == [
        *("probability", "mode", "widths", "initializer", "flag", "foo", "n")
    ]
    assert list(schema.options(WithoutBase)) == ["own"]


def test_defaults_are_filled_in_and_nested_parts_resolved():
    assert check(foo="anything") == {
        "probability": 0.0,
        "mode": "none",
        "widths": None,
        "initializer": {"name": "normal", "mean": 0.0, "std": 0.1},
        "flag": False,
        "foo": "anything",
        "n": 6,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, "part.n=0: must be at least 1 and at most 12."),
        ({"n": True}, "part.n=True: must be a number, not a boolean."),
        ({"n": 2.5}, "part.n=2.5: must be a valid integer"),
        ({"probability": 1.5}, "part.probability=1.5: must be at least 0 and at most 1."),
        ({"probability": math.nan}, "part.probability=nan: must be a finite number."),
        ({"probability": None}, "part.probability=None: must be a valid number."),
        ({"mode": "layerwize"}, "part.mode=layerwize: must be one of none, layerwise. Did you mean 'layerwise'?"),
        ({"widths": []}, "part.widths=[]: "),
        ({"widths": [3, 0]}, "part.widths.1=0: "),
        (
            {"probabilty": 0.1},
            "Unknown key 'part.probabilty' (value 0.1). Did you mean 'part.probability'? Allowed keys:",
        ),
        ({"size": 3}, "Unknown key 'part.size'"),
        ({"initializer": "norml"}, "Unknown initializer 'norml' (part.initializer.name=norml). Did you mean 'normal'?"),
        ({"initializer": {"name": "normal", "st": 1}}, "Unknown key 'part.initializer.st'"),
        ({"initializer": {"name": "normal", "std": -1.0}}, "part.initializer.std=-1.0: "),
    ],
)
def test_errors_name_the_full_key_the_value_and_what_is_allowed(values, message):
    with pytest.raises(ConfigError) as error:
        check(**values)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_missing_mandatory_option_is_named():
    with pytest.raises(ConfigError, match=r"^base\.size: must be given\.$"):
        schema.validate(Base, {}, "base")


def test_library_parts_are_checked_by_their_signature():
    good = {"_target_": "torch.optim.Adam", "lr": 0.1}
    schema.validate_target(good, "optimizer", provided=("params",))
    with pytest.raises(ConfigError, match=r"Unknown key 'optimizer.lrr' .* Did you mean 'optimizer.lr'\?"):
        schema.validate_target(good | {"lrr": 1}, "optimizer", provided=("params",))
    with pytest.raises(ConfigError, match="optimizer.lr=nan"):
        schema.validate_target(good | {"lr": math.nan}, "optimizer", provided=("params",))
    with pytest.raises(ConfigError, match="optimizer._target_=torch.optim.Adm: cannot be imported"):
        schema.validate_target({"_target_": "torch.optim.Adm"}, "optimizer")
    with pytest.raises(ConfigError, match="needs a _target_"):
        schema.validate_target({"lr": 1}, "optimizer")
