"""Test accuracy of a checkpoint: ``python scripts/evaluate.py ckpt=RUN/checkpoints/best.ckpt [data.root=DIR]``."""

import argparse
import sys

from omegaconf import OmegaConf

from difflut_lab.errors import ConfigError, UserError
from difflut_lab.training.evaluate import evaluate


def main() -> None:
    """Read ``key=value`` words from the command line and print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="+", metavar="ckpt=PATH | data.KEY=VALUE")
    words = OmegaConf.to_container(OmegaConf.from_dotlist(parser.parse_args().words))
    assert isinstance(words, dict)
    data = words.get("data")
    try:
        unknown = [str(key) for key in words if key not in ("ckpt", "data")]
        if unknown or "ckpt" not in words:
            raise ConfigError("write ckpt=PATH, and data.KEY=VALUE where the data lie elsewhere.")
        if data is not None and not isinstance(data, dict):
            raise ConfigError(
                f"data={data}: the data set is the checkpoint's; only its options can be set: data.KEY=VALUE."
            )
        results = evaluate(str(words["ckpt"]), data)
    except UserError as error:
        sys.exit(f"Error: {error}")
    relaxes = "test/acc_soft" in results
    print(f"test accuracy{', hard (truth tables)' if relaxes else ' ' * 21}  {100 * results['test/acc']:.2f} %")
    if relaxes:
        print(f"test accuracy, soft (relaxation)    {100 * results['test/acc_soft']:.2f} %")
        print(f"discretisation gap                  {100 * results['test/gap']:.2f} points")
    print(f"test loss                           {results['test/loss']:.4f}")


if __name__ == "__main__":
    main()
