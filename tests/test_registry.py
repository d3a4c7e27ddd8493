import pytest

from difflut_lab import REGISTRY, register_layer
from difflut_lab.errors import ConfigError
from difflut_lab.registry import KINDS, Registry


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_parts_and_gives_their_classes(kind):
    names = REGISTRY.names(kind)
    assert names == sorted(names)
    for name in names:
        assert isinstance(REGISTRY.get(kind, name), type)


def test_the_getters_look_in_their_own_kind():
    assert REGISTRY.get_layer("random_routing") is REGISTRY.get("layer", "random_routing")
    assert REGISTRY.get_node("dwn") is REGISTRY.get("node", "dwn")
    assert REGISTRY.get_encoder("thermometer") is REGISTRY.get("encoder", "thermometer")
    assert REGISTRY.get_head("group_sum") is REGISTRY.get("head", "group_sum")
    assert REGISTRY.get_model("lut_mlp") is REGISTRY.get("model", "lut_mlp")
    assert REGISTRY.get_data("digits") is REGISTRY.get("data", "digits")


def test_an_unknown_name_suggests_the_nearest_and_lists_all():
    with pytest.raises(ConfigError) as error:
        REGISTRY.get_layer("random_ruting")
    assert str(error.value).startswith(
        "Unknown layer 'random_ruting'. Did you mean 'random_routing'? Registered layers: "
    )
    assert "feature_wise_groups, learnable_routing, random_routing" in str(error.value)


def test_a_name_is_registered_once():
    registry = Registry(KINDS)

    @registry.register("layer", "mine")
    class First: ...

    assert registry.register("layer", "mine")(First) is First  # the same class again, as on a reload

    class Second: ...

    with pytest.raises(ConfigError, match=r"layer 'mine' is already registered, by .*First"):
        registry.register("layer", "mine")(Second)
    with pytest.raises(ConfigError, match="'random_routing' is already registered"):
        REGISTRY.names("layer") and register_layer("random_routing")(Second)


def test_build_takes_a_name_or_a_mapping():
    assert REGISTRY.build("initializer", "normal").std == 0.1
    assert REGISTRY.build("initializer", {"name": "normal", "std": 2.0}).std == 2.0
