"""From a configuration to a trained network: composition, the training loop, tracking, run directories."""


def main() -> None:
    """Run the command line: compose the configuration of ``sys.argv`` and train (``train.py``, ``difflut-lab``)."""
    from difflut_lab.training.cli import main as run_command_line

    run_command_line()


__all__ = ["main"]
