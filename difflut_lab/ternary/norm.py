"""Batch normalisation whose scales may be ternary."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from difflut_lab.errors import ConfigError
from difflut_lab.registry import register_ternary
from difflut_lab.schema import PositiveFloat, PositiveInt, Probability
from difflut_lab.seeding import derive_seed
from difflut_lab.ternary.base import QuantizerSpec
from difflut_lab.ternary.quantizers import build_quantizer


@register_ternary("batch_norm")
class TernaryBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation (Ioffe and Szegedy, arXiv 1502.03167) of features ``(B, F)`` or channels ``(B, F, H, W)``.

    Statistics, running averages and state are those of ``nn.BatchNorm1d`` and ``nn.BatchNorm2d``. Gamma may be ternary:
    with a quantizer, all features share one scale and each has a code, so that normalising takes one multiplication
    constant for the layer, and features of code 0 are switched off, as in network slimming (Liu et al.,
    arXiv 1708.06519). By default gamma is in float, which costs nothing where the layer is folded into a ternary layer
    before it.

    Parameters
    ----------
    num_features : int
        F.
    eps : float
        Added to the variance.
    momentum : float, optional
        Weight of a batch in the running averages; None for averages over all batches.
    affine : bool
        Whether gamma and beta are learned.
    quantizer : str, mapping or Quantizer
        Of gamma; its granularity is ``tensor``, whatever it says.
    seed : int
        Of the draws of a quantizer that draws codes.

    Raises
    ------
    ConfigError
        If there is a quantizer, but no gamma.

    Attributes
    ----------
    weight, bias : nn.Parameter or None
        Latent gamma, 1 at the start, and beta, 0 at the start, ``(F,)``.
    running_mean, running_var, num_batches_tracked : Tensor
        Buffers, as of ``nn.BatchNorm2d``.
    draw_step : Tensor
        Number of training forwards so far, int64, a buffer; of quantizers that draw codes only.
    """

    draw_step: Tensor

    def __init__(
        self,
        num_features: PositiveInt,
        eps: PositiveFloat = 1e-5,
        momentum: Probability | None = 0.1,
        affine: bool = True,
        *,
        quantizer: QuantizerSpec = "none",
        seed: int = 42,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine)
        self.seed = seed
        self.quantizer = build_quantizer(quantizer)
        if not affine and not self.quantizer.is_float:
            raise ConfigError("affine=False: there is no gamma that a quantizer could make ternary.")
        if affine:
            self.quantizer.prepare(self.weight)
        if self.quantizer.draws:
            self.register_buffer("draw_step", torch.zeros((), dtype=torch.int64))

    def effective_weight(self) -> Tensor | None:
        """Gamma of this forward, ``(F,)``, ternary where so configured; None without one."""
        if self.weight is None or self.quantizer.is_float:
            return self.weight
        draws = None
        if self.training and self.quantizer.draws:
            self.draw_step += 1
            draws = torch.Generator(self.weight.device)
            draws.manual_seed(derive_seed(self.seed, "weight", int(self.draw_step)))
        value: Tensor = self.quantizer(self.weight, draws).values()
        blend = self.quantizer.blend if self.training else 1.0
        return value if blend == 1 else blend * value + (1 - blend) * self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Normalised features, of the shape of the inputs ``(B, F)`` or ``(B, F, H, W)``.

        Raises
        ------
        ValueError
            If inputs have another shape, or in training one value per feature only.
        """
        self._check_input_dim(x)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.effective_weight(),
            self.bias,
            self.training,
            momentum,
            self.eps,
        )

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4) or input.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} expects inputs (B, {self.num_features}) or (B, {self.num_features}, H, W), "
                f"got {tuple(input.shape)}."
            )
