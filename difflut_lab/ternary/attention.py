"""Attention with ternary projections."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from difflut_lab.errors import ConfigError
from difflut_lab.registry import register_ternary
from difflut_lab.schema import PositiveInt, Probability
from difflut_lab.seeding import derive_seed
from difflut_lab.ternary.base import ActivationBits, Augmented, LayerConfigSpec, QuantizerSpec
from difflut_lab.ternary.linear import TernaryLinear


@register_ternary("attention")
class TernaryAttention(Augmented):
    """Multi-head attention (Vaswani et al., arXiv 1706.03762) whose four projections have ternary weights.

    Between the projections, torch's fused scaled dot-product attention computes in float.

    Parameters
    ----------
    d_model : int
        D, features of inputs and outputs.
    num_heads : int
        Must divide D.
    dropout : float
        Probability of dropping an attention weight, in training.
    bias : bool
        Whether the projections have biases.
    quantizer, bias_quantizer, activation_bits, layer_config, seed
        As of ``TernaryLayer``.

    Raises
    ------
    ConfigError
        If the heads do not divide the features.

    Attributes
    ----------
    q_proj, k_proj, v_proj, out_proj : TernaryLinear
    """

    def __init__(
        self,
        d_model: PositiveInt,
        num_heads: PositiveInt = 8,
        dropout: Probability = 0.0,
        bias: bool = True,
        *,
        quantizer: QuantizerSpec = "absmean",
        bias_quantizer: QuantizerSpec = "none",
        activation_bits: ActivationBits = None,
        layer_config: LayerConfigSpec = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ConfigError(f"num_heads={num_heads}: must divide d_model={d_model}.")
        self.d_model = d_model
        self.num_heads = num_heads
        self.dropout = dropout
        ternary: dict[str, Any] = {
            "quantizer": quantizer,
            "bias_quantizer": bias_quantizer,
            "activation_bits": activation_bits,
            "layer_config": layer_config,
        }
        self.q_proj = TernaryLinear(d_model, d_model, bias, seed=derive_seed(seed, "q_proj"), **ternary)
        self.k_proj = TernaryLinear(d_model, d_model, bias, seed=derive_seed(seed, "k_proj"), **ternary)
        self.v_proj = TernaryLinear(d_model, d_model, bias, seed=derive_seed(seed, "v_proj"), **ternary)
        self.out_proj = TernaryLinear(d_model, d_model, bias, seed=derive_seed(seed, "out_proj"), **ternary)
        self.layer_config = layer_config

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Outputs ``(B, T, D)`` of queries from ``x (B, T, D)`` and keys and values from ``context (B, S, D)``.

        Parameters
        ----------
        x : Tensor
            ``(B, T, D)``
        context : Tensor, optional
            ``(B, S, D)``; x itself by default.
        mask : Tensor, optional
            Broadcastable to ``(B, heads, T, S)``: bool, True where a query may attend to a key; or float, added to the
            scores.
        causal : bool
            Whether query t attends to keys 0 to t only; not together with a mask.

        Raises
        ------
        ValueError
            If both a mask and ``causal`` are given.
        """
        if causal and mask is not None:
            raise ValueError("causal=True together with a mask: put both into one mask.")
        source = x if context is None else context
        query = self._heads(self.q_proj(x))
        key, value = self._heads(self.k_proj(source)), self._heads(self.v_proj(source))
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0, is_causal=causal
        )
        output: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return output

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, num_heads={self.num_heads}, dropout={self.dropout}"

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
