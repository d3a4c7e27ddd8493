"""Times of the ops and of a whole training step: ``make bench``, or ``python scripts/benchmark.py --batch 128 1024``.

Every row is the median of repeated runs with its 20 % and 80 % quantiles, in milliseconds; backends alternate run by
run, so that a busy machine slows all of them. The table is printed and written to ``outputs/benchmark.csv``.
"""

import argparse
import csv
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from difflut_lab.layers import LayerConfig
from difflut_lab.models import LUTMLP
from difflut_lab.ops import Wiring, efd_table, interpolate, lookup, use_kernels

INPUTS, NODES = 1568, 2000

Step = tuple[Callable[[], Tensor], Callable[[Tensor], None]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[128])
    parser.add_argument("--fan-in", type=int, nargs="+", default=[6])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for batch in arguments.batch:
        for n in arguments.fan_in:
            for name, step in steps(batch, n).items():
                rows += measure(name, batch, n, step, arguments.runs)
    show(rows)


def steps(batch: int, n: int) -> dict[str, Step]:
    """What is measured: a forward, and a backward of its output, with gradients for inputs and tables."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(INPUTS, batch, generator=generator).t().requires_grad_()
    table = torch.rand(NODES, 2**n, generator=generator).requires_grad_()
    indices = torch.stack([torch.randperm(INPUTS, generator=generator)[:n] for _ in range(NODES)]).int()
    wiring = Wiring(indices, INPUTS)
    dense = torch.nn.Linear(INPUTS, NODES)
    dense_x = torch.rand(batch, INPUTS, generator=generator).requires_grad_()
    gradient = torch.randn(NODES, batch, generator=generator).t()

    def backward(y: Tensor) -> None:
        y.backward(gradient)

    found: dict[str, Step] = {
        "interpolate": (lambda: interpolate(x, table, wiring), backward),
        "lookup + EFD table": (lambda: lookup(x, table, efd_table(table.detach()), wiring), backward),
        "nn.Linear": (lambda: dense(dense_x), backward),
    }
    for node in ("probabilistic", "dwn"):
        for probability in (0.0, 0.05):
            flips = f", flips {probability}" if probability else ""
            found[f"{node} network{flips}"] = network(node, n, batch, probability)
    return found


def network(node: str, n: int, batch: int, flip_probability: float) -> Step:
    """Forward, and backward with the optimizer's step, of a whole network as `experiment=mnist_random` trains it."""
    model = LUTMLP(
        widths=[2000, 1000],
        input_shape=(784,),
        num_classes=10,
        encoder={"name": "distributive_thermometer", "bits": 3},
        layer={"name": "random_routing"},
        node={"name": node, "n": n},
        head={"name": "group_sum", "tau": 3.3333},
        layer_config=vars(LayerConfig(flip_probability=flip_probability)),
    )
    features, labels = torch.rand(batch, 784), torch.randint(10, (batch,))
    model.calibrate(torch.rand(1000, 784))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def backward(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return lambda: F.cross_entropy(model(features), labels), backward


def measure(name: str, batch: int, n: int, step: Step, runs: int) -> list[dict[str, object]]:
    """Rows of forward, backward and both, for every backend; the backends take turns."""
    forward, backward = step
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in range(runs + WARM_UP):
        for kernels in BACKENDS:
            use_kernels(kernels)
            start = time.perf_counter()
            y = forward()
            middle = time.perf_counter()
            backward(y)
            end = time.perf_counter()
            if run >= WARM_UP:
                seconds[kernels, "forward"].append(1e3 * (middle - start))
                seconds[kernels, "backward"].append(1e3 * (end - middle))
                seconds[kernels, "both"].append(1e3 * (end - start))
    return [
        {"what": name, "batch": batch, "n": n, "kernels": kernels, "part": part}
        | {quantile: round(_quantile(values, share), 3) for quantile, share in QUANTILES.items()}
        | {"times reference": round(_quantile(seconds["reference", part], 0.5) / _quantile(values, 0.5), 2)}
        for (kernels, part), values in seconds.items()
    ]


BACKENDS = ("reference", "cpu")
WARM_UP = 3
QUANTILES = {"median ms": 0.5, "20 % ms": 0.2, "80 % ms": 0.8}


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]


def show(rows: list[dict[str, object]]) -> None:
    """Print the table and write it."""
    table = Table(title=f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for column in rows[0]:
        table.add_column(column, justify="left" if column in ("what", "kernels", "part") else "right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=120).print(
        table,
        f"F = {INPUTS}, N = {NODES}, fp32, {platform.machine()}; networks of [2000, 1000] nodes, with Adam's step",
    )
    path = Path("outputs") / "benchmark.csv"
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
