from pathlib import Path

import pytest

from difflut_lab.training.paths import claim, config_hash, override_words, replacing


def test_override_words_are_short_file_names():
    assert override_words(["layer=random_routing", "+model.per_layer.0.layer.candidates=16"]) == (
        "layer=random_routing,model.per_layer.0.layer.candidates=16"
    )
    words = override_words([f"data.root=/some/where/{'x' * 300}", "model.widths=[2000,1000]"])
    assert len(words) <= 80
    assert "/" not in words


def test_the_hash_knows_the_configuration_not_the_order():
    assert config_hash({"a": 1, "b": [2]}) == config_hash({"b": [2], "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_two_starts_in_one_second_never_share_a_directory(tmp_path):
    found = [claim(f"{tmp_path}/runs/same") for _ in range(3)]
    assert [Path(path).name for path in found] == ["same", "same_2", "same_3"]
    assert all(Path(path).is_dir() for path in found)
