"""Attention, against torch's with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from difflut_lab.errors import ConfigError
from difflut_lab.ternary import TernaryAttention

B, T, S, D, HEADS = 2, 5, 7, 12, 3


def twin(attention: TernaryAttention) -> nn.MultiheadAttention:
    """Torch's attention, with the weights that are used in eval mode."""
    reference = nn.MultiheadAttention(D, HEADS, batch_first=True)
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([layer.eval().effective_weight() for layer in projections]))
        reference.in_proj_bias.copy_(torch.cat([layer.bias for layer in projections if layer.bias is not None]))
        reference.out_proj.load_state_dict(
            {"weight": attention.out_proj.eval().effective_weight(), "bias": attention.out_proj.bias}
        )
    return reference.eval()


@pytest.mark.parametrize("quantizer", ["none", "absmean", "ttq"])
@pytest.mark.parametrize("case", ["self", "cross", "causal", "bool", "float", "per sample"])
def test_is_that_of_torch(case: str, quantizer: str) -> None:
    attention = TernaryAttention(D, HEADS, quantizer=quantizer).eval()
    x, context = torch.randn(B, T, D), torch.randn(B, S, D)
    # torch's module has True where a query may not attend
    later = torch.ones(T, T).triu(1).bool()
    kept = torch.rand(T, S) < 0.6
    kept[:, 0] = True
    added = torch.randn(T, S)
    short = torch.arange(S) < torch.tensor([[3], [S]])
    # ours, and the key, mask and padding of torch's
    uses: dict[str, tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = {
        "self": (attention(x), x, None, None),
        "cross": (attention(x, context), context, None, None),
        "causal": (attention(x, causal=True), x, later, None),
        "bool": (attention(x, context, mask=kept), context, ~kept, None),
        "float": (attention(x, context, mask=added), context, added, None),
        "per sample": (attention(x, context, mask=short[:, None, None]), context, None, ~short),
    }
    got, key, mask, padding = uses[case]
    wanted, _ = twin(attention)(x, key, key, attn_mask=mask, key_padding_mask=padding, need_weights=False)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_later_inputs_do_not_matter_where_it_is_causal() -> None:
    attention = TernaryAttention(D, HEADS).eval()
    x, changed = torch.randn(B, T, D), torch.randn(B, T, D)
    changed[:, :3] = x[:, :3]
    assert torch.allclose(attention(x, causal=True)[:, :3], attention(changed, causal=True)[:, :3], atol=1e-6)
    assert not torch.allclose(attention(x)[:, :3], attention(changed)[:, :3], atol=1e-3)


def test_mask_together_with_causal_is_refused() -> None:
    with pytest.raises(ValueError, match="put both into one mask"):
        TernaryAttention(D, HEADS)(torch.randn(B, T, D), mask=torch.ones(T, T).bool(), causal=True)


@pytest.mark.parametrize("length", [1, 3, 64])
def test_any_length(length: int) -> None:
    assert TernaryAttention(D, HEADS)(torch.randn(B, length, D)).shape == (B, length, D)


def test_heads_must_divide_the_features() -> None:
    with pytest.raises(ConfigError, match="num_heads=5: must divide d_model=12"):
        TernaryAttention(12, 5)


def test_dropout_in_training_only() -> None:
    attention, x = TernaryAttention(D, HEADS, dropout=0.5), torch.randn(B, T, D)
    assert not torch.equal(attention(x), attention(x))
    evaluated = attention.eval()(x)
    attention.dropout = 0.0
    assert torch.equal(evaluated, attention(x)) and torch.equal(evaluated, attention.train()(x))


def test_projections_differ_from_each_other() -> None:
    attention = TernaryAttention(D, HEADS)
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, attention.out_proj.weight]
    assert len({float(weight.detach().sum()) for weight in weights}) == 4
