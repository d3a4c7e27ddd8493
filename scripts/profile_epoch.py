"""Where an epoch's time goes: ``python scripts/profile_epoch.py experiment=mnist_random data.root=DIR``.

Trains ``epochs`` (default 3) epochs of any configuration and prints the median shares of the last ones: the network's
forward, backward and optimizer step, validation's forward, and everything else.
"""

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.loggers import Logger

from difflut_lab.training import run as training
from difflut_lab.training.compose import Config
from difflut_lab.training.network import Network
from difflut_lab.training.paths import config_directory, register_resolvers


class Clock(L.Callback):
    """Adds up the seconds of each part of an epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._start: dict[str, float] = {}

    def begin(self, part: str) -> None:
        """Start the clock of a part."""
        self._start[part] = time.perf_counter()

    def end(self, part: str) -> None:
        """Stop the clock of a part."""
        self._seconds[part] += time.perf_counter() - self._start[part]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Time the forward of the network itself."""
        if stage == "fit":
            network = pl_module.network
            assert isinstance(network, Network)
            network.register_forward_pre_hook(lambda *_: self.begin(self._forward(network)))
            network.register_forward_hook(lambda *_: self.end(self._forward(network)))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start an epoch."""
        if not self.epochs:
            trainer.optimizers[0].register_step_post_hook(lambda *_: self.end("optimizer step"))
        self._seconds.clear()
        self.begin("epoch")

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        """Start a backward."""
        self.begin("backward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End a backward."""
        self.end("backward")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Start the step, after its closure."""
        self.begin("optimizer step")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the epoch's seconds."""
        self.end("epoch")
        self.epochs.append(dict(self._seconds))

    @staticmethod
    def _forward(network: Network) -> str:
        return "forward" if network.training else "forward of validation"


def main() -> None:
    """Train and print the table."""
    words = [word for word in sys.argv[1:] if not word.startswith("epochs=")]
    epochs = next((int(word[7:]) for word in sys.argv[1:] if word.startswith("epochs=")), 3)
    words += [f"trainer.max_epochs={epochs}", "logger=none"]
    register_resolvers()
    clock = Clock()
    original = training._build_trainer

    def with_clock(config: Config, loggers: list[Logger], directory: Path, own: Sequence[L.Callback]) -> L.Trainer:
        return original(config, loggers, directory, [*own, clock])

    training._build_trainer = with_clock
    with tempfile.TemporaryDirectory() as directory:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            config = compose("train", words)
        training.run(config, words, Path(directory))
    measured = clock.epochs[1:] or clock.epochs
    total = statistics.median(epoch["epoch"] for epoch in measured)
    outside = total
    print(f"\nmedian of {len(measured)} epochs, {torch.get_num_threads()} threads")
    for part in ("forward", "backward", "optimizer step", "forward of validation"):
        seconds = statistics.median(epoch[part] for epoch in measured)
        outside -= seconds
        print(f"{part:24}{seconds:8.2f} s {100 * seconds / total:6.1f} %")
    print(f"{'everything else':24}{outside:8.2f} s {100 * outside / total:6.1f} %")
    print(f"{'epoch':24}{total:8.2f} s")


if __name__ == "__main__":
    main()
