"""Pack a checkpoint: ``python scripts/pack.py ckpt=RUN/checkpoints/best.ckpt [output=PATH] [storage=2bit|base3]``.

Writes the network with codes in place of float weights, beside the checkpoint unless told otherwise, and compares the
two on the test split (data.KEY=VALUE where the data lie elsewhere).
"""

import argparse
import sys
from typing import Any

from omegaconf import OmegaConf
from rich.table import Table

from difflut_lab.errors import ConfigError, UserError
from difflut_lab.training.console import new_console, shown_path
from difflut_lab.training.packed import Agreement, Packed, compare, pack_checkpoint

KEYS = ("ckpt", "output", "storage", "data")
MIB = 2**20


def main() -> None:
    """Read ``key=value`` words from the command line, pack, and print sizes and accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="ckpt=PATH | output=PATH | storage=NAME | data.KEY=VALUE")
    words = OmegaConf.to_container(OmegaConf.from_dotlist(parser.parse_args().words))
    assert isinstance(words, dict)
    try:
        _run({str(key): value for key, value in words.items()})
    except UserError as error:
        sys.exit(f"Error: {error}")


def _run(words: dict[str, Any]) -> None:
    data = words.get("data")
    if "ckpt" not in words or any(key not in KEYS for key in words):
        raise ConfigError("write ckpt=PATH, output=PATH, storage=2bit or base3, and data.KEY=VALUE.")
    if data is not None and not isinstance(data, dict):
        raise ConfigError(
            f"data={data}: the data set is the checkpoint's; only its options can be set: data.KEY=VALUE."
        )
    ckpt, output = str(words["ckpt"]), words.get("output")
    packed = pack_checkpoint(ckpt, None if output is None else str(output), storage=words.get("storage", "2bit"))
    _show_sizes(packed)
    _show_agreement(compare(ckpt, packed.network, data))


def _show_sizes(packed: Packed) -> None:
    table = Table()
    for title in ("ternary layer", "weight", "zeros", "float MiB", "packed MiB", "ratio"):
        table.add_column(title, justify="left" if title == "ternary layer" else "right", no_wrap=True)
    for layer in packed.layers:
        shape = " x ".join(str(size) for size in layer.weight_shape)
        table.add_row(layer.name, shape, f"{100 * layer.zeros:.1f} %", *_sizes(layer.float_bytes, layer.packed_bytes))
    table.add_section()
    table.add_row("whole network", "", "", *_sizes(packed.float_bytes, packed.packed_bytes))
    console = new_console()
    console.print(table)
    console.print(f"{shown_path(packed.path)}", soft_wrap=True, highlight=False)


def _sizes(float_bytes: int, packed_bytes: int) -> tuple[str, str, str]:
    return f"{float_bytes / MIB:.3f}", f"{packed_bytes / MIB:.3f}", f"{float_bytes / packed_bytes:.1f}"


def _show_agreement(agreement: Agreement) -> None:
    print(f"test accuracy          {100 * agreement.accuracy:.2f} %")
    print(f"test accuracy, packed  {100 * agreement.packed_accuracy:.2f} %")
    if agreement.differing and not agreement.rounds:
        sys.exit(f"Error: the packed network differs on {agreement.differing} of {agreement.samples} test samples.")
    if agreement.differing:
        print(
            f"They name different classes for {agreement.differing} of the {agreement.samples} test samples: rounded "
            "activations on the border between two steps go either way."
        )
        return
    print(f"Both give the same class for each of the {agreement.samples} test samples.")


if __name__ == "__main__":
    main()
