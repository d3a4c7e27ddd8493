from __future__ import annotations

import csv

import pytest
import torch

from difflut_lab.training.checkpoint import read

TABLES = "nodes.weight"


def rows(directory):
    with open(directory / "history.csv") as file:
        return list(csv.DictReader(file))


def tables(directory, name="last"):
    state = read(directory / "checkpoints" / f"{name}.ckpt")["state_dict"]
    return [tensor.double() for key, tensor in state.items() if key.endswith(TABLES)]


def test_what_is_logged_is_the_sum_over_all_banks_and_the_loss_is_without_it(train):
    # an optimizer that stands still: the tables are those of the first step
    words = [
        "node=probabilistic",
        "optimizer=sgd",
        "optimizer.lr=1e-12",
        "optimizer.momentum=0",
        "data.val_fraction=0.3",
    ]
    without = train(*words, name="without")
    added = train(*words, "node.regularizer={name: l2, weight: 0.5}", name="added")
    once = train(*words, "+model.per_layer.1.node.regularizer={name: l2, weight: 0.5}", name="once")
    assert "train/regularization" not in rows(without)[0]
    assert [row["train/loss"] for row in rows(added)] == [row["train/loss"] for row in rows(without)]
    for directory, banks in ((added, tables(added)), (once, tables(once)[1:])):
        expected = 0.5 * sum(penalty_l2(table) for table in banks)
        for row in rows(directory):
            assert float(row["train/regularization"]) == pytest.approx(expected, rel=1e-4)


def penalty_l2(table):
    return float(table.square().mean())


def test_a_stronger_penalty_shrinks_the_weights(train):
    words = ["node=probabilistic", "optimizer.lr=0.05"]
    norms = []
    for weight in (0, 1, 100):
        directory = train(*words, f"node.regularizer={{name: l2, weight: {weight}}}", name=f"weight_{weight}")
        norms.append(sum(float(table.square().sum()) for table in tables(directory)))
    assert norms[0] > norms[1] > norms[2]


def test_it_goes_with_low_precision_and_clipping(train):
    words = [
        "node.regularizer=l1",
        "trainer.precision=bf16-mixed",
        "trainer.gradient_clip_val=0.5",
        "optimizer.fused=false",
    ]
    directory = train(*words, "node=probabilistic")
    assert all(torch.isfinite(table).all() for table in tables(directory))
    assert all(float(row["train/regularization"]) > 0 for row in rows(directory))
