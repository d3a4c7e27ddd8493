from typing import Any

import pytest
import torch

from difflut_lab.errors import ConfigError
from difflut_lab.layers import soft
from difflut_lab.models import LUTMLP

GROUPS: dict[str, Any] = {
    "encoder": {"name": "thermometer", "bits": 3},
    "layer": {"name": "random_routing"},
    "node": {"name": "probabilistic", "n": 4},
    "head": {"name": "group_sum", "tau": 2.0},
}


def build(widths=(30, 20), num_classes=5, **options):
    model = LUTMLP(widths=list(widths), input_shape=(1, 4, 4), num_classes=num_classes, **(GROUPS | options))
    model.calibrate(torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    return model


def features(count=16):
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def test_the_last_width_is_rounded_up_to_a_multiple_of_the_classes():
    model = build(widths=[30, 21])
    assert [layer.output_size for layer in model.layers] == [30, 25]
    assert model.counts["tables"] == 55
    resolved = LUTMLP.resolve({"widths": [30, 21]}, {"layer": {}, "node": {}, "layer_config": {}}, num_classes=5)
    assert resolved == {"widths": [30, 25], "per_layer": {}}


def test_in_eval_mode_the_network_is_its_truth_tables():
    model = build().eval()
    bits = model.encoder(features())
    for layer in model.layers:
        table, wiring = layer.nodes.truth_table(), layer.wiring().long()
        address = (bits[:, wiring].long() << torch.arange(4)).sum(dim=2)
        bits = table.float().gather(1, address.t()).t()
    expected = bits.reshape(16, 5, 4).sum(dim=2) / 2.0
    assert torch.equal(model(features()), expected)
    with soft(model):
        assert not torch.equal(model(features()), expected)
    assert torch.equal(model(features()), expected)


def test_equal_scores_go_to_the_lowest_class():
    model = build().eval()
    for layer in model.layers:
        torch.nn.init.ones_(layer.nodes.weight)
    assert model(features()).argmax(dim=1).eq(0).all()


def test_no_two_layers_and_no_two_purposes_share_a_stream():
    model = build(widths=[20, 20, 20])
    first, second = model.layers[1], model.layers[2]
    assert not torch.equal(first.wiring(), second.wiring())
    assert not torch.equal(first.nodes.weight, second.nodes.weight)
    assert [layer.layer_index for layer in model.layers] == [0, 1, 2]
    assert not torch.equal(build(seed=1).layers[0].wiring(), build(seed=2).layers[0].wiring())


def test_building_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    build(layer={"name": "learnable_routing", "candidates": 4})
    assert torch.equal(torch.get_rng_state(), before)


def test_per_layer_settings_merge_or_replace():
    model = build(
        per_layer={
            0: {"layer": {"name": "learnable_routing", "candidates": 4}, "node": {"temperature": 2.0}},
            1: {"node": {"name": "dwn"}, "layer_config": {"flip_probability": 0.25}},
        }
    )
    first, second = model.layers
    assert type(first).__name__ == "LearnableRouting"
    assert first.nodes.temperature == 2.0
    assert first.layer_config.flip_probability == 0
    assert type(second).__name__ == "RandomRouting"
    assert type(second.nodes).__name__ == "DWNNodes"
    assert second.n == 4, "fan-in stays unless it is set"
    assert second.layer_config.flip_probability == 0.25


def test_a_layer_beyond_the_stack_is_an_error():
    with pytest.raises(ConfigError, match=r"model\.per_layer\.2: there is no such layer"):
        build(per_layer={2: {"node": {"n": 2}}})


def test_one_group_per_feature_only_in_the_first_layer():
    options = {"name": "feature_wise_groups", "num_groups": "features"}
    model = build(per_layer={0: {"layer": options}})
    wiring = model.layers[0].wiring()
    for node in wiring:
        used = node[node >= 0]
        assert len({int(bit) // 3 for bit in used}) == 1, "a node reads bits of one feature only"
    with pytest.raises(ConfigError, match="features"):
        build(layer=options)


def test_gradients_reach_every_parameter():
    model = build(layer={"name": "learnable_routing"}).train()
    model(features()).logsumexp(dim=1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.ne(0).any(), name
