"""What becomes of ternary layers while they are trained, layer by layer and epoch by epoch."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from difflut_lab.errors import TrainingError
from difflut_lab.ternary import TernaryLayer
from difflut_lab.training.paths import replacing
from difflut_lab.training.tracking import log_histograms

MEASURES = ("negative", "zero", "positive", "flip_rate", "dead_channels", "grad_norm")
COLUMNS = ("epoch", "layer", *MEASURES)
LATENT_BINS = 64


class TernaryHealth(Callback):
    """Measures every ternary layer at the end of each epoch, and stops a training in which one has only zeros.

    Logged as ``health/LAYER/MEASURE`` and written to ``health.csv``, a row per epoch and layer: ``negative``, ``zero``
    (the sparsity) and ``positive``, shares of the codes; ``flip_rate``, the share of codes that are others than an
    epoch ago; ``dead_channels``, the number of outputs whose codes are all 0; ``grad_norm``, the norm of the latent
    weight's gradient in the epoch's last step. Histograms of codes and of latent weights, in units of the layer's mean
    scale, go to wandb.

    Parameters
    ----------
    network : nn.Module
        The network as it was built.
    path : Path
        Of ``health.csv``.
    """

    def __init__(self, network: nn.Module, path: Path) -> None:
        self.layers = ternary_layers(network)
        self.path = path
        self._codes: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the codes, and forget the rows of epochs that are trained again."""
        self._codes = {name: layer.quantized().codes.to(torch.int8) for name, layer in self.layers.items()}
        if self.path.exists() and trainer.is_global_zero:
            with open(self.path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < trainer.current_epoch]
            with replacing(self.path) as temporary, open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look for layers of zeros before the first step."""
        if trainer.global_step == 0 and batch_idx == 0:
            self._check_zeros(self._codes, "before the first step")

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the norms of the gradients of an epoch's last step."""
        if trainer.is_last_batch:
            # gradients of half precision are scaled up; fused optimizers undo it themselves, and later
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            is_scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
            scale = scaler.get_scale() if scaler is not None and is_scaled else 1.0
            self._gradients = {
                name: layer.weight.grad.norm() / scale
                for name, layer in self.layers.items()
                if layer.weight.grad is not None
            }

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, log, write; stop where a layer has only zeros, before anything is saved."""
        rows, histograms = [], {}
        for name, layer in self.layers.items():
            ternary = layer.quantized()
            codes = ternary.codes.to(torch.int8)
            counts = torch.stack([(codes == code).sum() for code in (-1, 0, 1)]).tolist()
            measured = dict(zip(MEASURES, (count / codes.numel() for count in counts), strict=False)) | {
                "flip_rate": float((codes != self._codes[name]).float().mean()),
                "dead_channels": int((codes.flatten(1) == 0).all(dim=1).sum()),
                "grad_norm": float(self._gradients.get(name, torch.zeros(()))),
            }
            rows.append({"epoch": trainer.current_epoch, "layer": name} | measured)
            pl_module.log_dict({f"health/{name}/{measure}": float(value) for measure, value in measured.items()})
            latent = (layer.weight.detach() / ternary.scale.mean()).float().cpu()
            histograms[f"health/{name}/codes"] = (counts, [-1.5, -0.5, 0.5, 1.5])
            heights, edges = torch.histogram(latent, LATENT_BINS)
            histograms[f"health/{name}/latent"] = (heights.tolist(), edges.tolist())
            self._codes[name] = codes
        if trainer.is_global_zero:
            self._write(rows)
            log_histograms(trainer.loggers, histograms, trainer.current_epoch)
        self._check_zeros(self._codes, f"after epoch {trainer.current_epoch + 1}")

    def _write(self, rows: list[dict[str, Any]]) -> None:
        new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(
                {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
                for row in rows
            )

    def _check_zeros(self, codes: dict[str, Tensor], when: str) -> None:
        for name, layer_codes in codes.items():
            if not layer_codes.any():
                quantizer = self.layers[name].quantizer
                raise TrainingError(
                    f"Training stopped {when}: every code of layer '{name}' is 0, so that it passes nothing on and "
                    f"learns nothing (quantizer {type(quantizer).__name__}({quantizer.extra_repr()})). Lower the "
                    "threshold, the learning rate or the weight decay, or choose another quantizer."
                )


def ternary_layers(network: nn.Module) -> dict[str, TernaryLayer]:
    """The layers with ternary weights by name, without those in float; names are those within the model."""
    return {
        name.removeprefix("model."): module
        for name, module in network.named_modules()
        if isinstance(module, TernaryLayer) and not module.is_float
    }
