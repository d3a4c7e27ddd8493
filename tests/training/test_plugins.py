import sys
from importlib.metadata import EntryPoint

import pytest
from hydra.core.config_store import ConfigStore

from difflut_lab import REGISTRY
from difflut_lab.errors import ConfigError
from difflut_lab.registry import KINDS
from difflut_lab.training import plugins
from difflut_lab.training.compose import resolve

SOURCE = """
from difflut_lab import register_layer, register_node
from difflut_lab.layers import BaseLUTLayer
from difflut_lab.nodes.dwn import DWNNodes
from difflut_lab.schema import PositiveInt

@register_layer("{name}_layer")
class Layer(BaseLUTLayer):
    def __init__(self, *args, strength: PositiveInt = 3, **kwargs):
        super().__init__(*args, **kwargs)

@register_node("{name}_node")
class Node(DWNNodes):
    pass
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes plugin modules into the working directory; what they register is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    parts = {kind: dict(REGISTRY._loaded(kind)) for kind in KINDS}
    names = []

    def module(name):
        (tmp_path / f"{name}.py").write_text(SOURCE.format(name=name))
        names.append(name)

    yield module
    for name in names:
        sys.modules.pop(name, None)
    for kind, known in parts.items():
        for added in set(REGISTRY._parts[kind]) - set(known):
            del REGISTRY._parts[kind][added]
            ConfigStore.instance().repo.get(kind, {}).pop(f"{added}.yaml", None)


def test_plugins_come_from_the_configuration_the_environment_and_installed_packages(write, monkeypatch):
    for name in ("plugin_a", "plugin_b", "plugin_c"):
        write(name)
    entry = EntryPoint(name="c", value="plugin_c", group=plugins.ENTRY_POINTS)
    monkeypatch.setattr(plugins.importlib.metadata, "entry_points", lambda group: [entry])
    monkeypatch.setenv(plugins.ENVIRONMENT_VARIABLE, "plugin_b")
    assert plugins.load_plugins(["plugin_a"]) == ["plugin_a", "plugin_b", "plugin_c"]
    for name in ("plugin_a", "plugin_b", "plugin_c"):
        assert f"{name}_layer" in REGISTRY.names("layer")


def test_a_part_without_a_file_becomes_a_choice_with_its_signatures_defaults(write, composed):
    write("plugin_d")
    plugins.load_plugins(["plugin_d"])
    plugins.offer_parts()
    assert "plugin_d_layer" in plugins.choices("layer")
    words = ["layer=plugin_d_layer", "node=plugin_d_node", "fan_in=4", "layer.strength=5"]
    config = resolve(composed(*words), words)
    assert config["layer"] == {"name": "plugin_d_layer", "strength": 5}
    assert config["node"]["n"] == 4, "nodes of plugins follow fan_in like the built-in ones"
    with pytest.raises(ConfigError, match=r"layer\.strength=0: must be at least 1"):
        resolve(composed("layer=plugin_d_layer", "layer.strength=0"), [])


def test_a_plugin_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"plugins=\[no_such_module\]: there is no module 'no_such_module'"):
        plugins.load_plugins(["no_such_module"])


def test_an_import_error_inside_a_plugin_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "plugin_e.py").write_text("import no_such_library\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        plugins.load_plugins(["plugin_e"])
