import csv
import json

from omegaconf import OmegaConf

from difflut_lab.training.sweep import show, summarise


def job(directory, name, overrides, results):
    path = directory / name
    path.mkdir()
    OmegaConf.save(OmegaConf.create(overrides), path / "overrides.yaml")
    if results:
        (path / "metrics.json").write_text(json.dumps(results))


def test_a_sweep_becomes_one_table_ordered_by_job_with_failures_in_it(tmp_path, capsys):
    results = {"test/acc": 0.5, "test/acc_soft": 0.6, "test/gap": 0.1, "val/acc": 0.55, "train/seconds": 3.21}
    job(tmp_path, "10_seed=10_abc", ["seed=10", "fan_in=4"], results)
    job(tmp_path, "2_seed=2_abc", ["seed=2", "fan_in=4"], None)
    job(tmp_path, "0_seed=0_abc", ["seed=0", "fan_in=4"], results | {"test/acc": 0.25})
    (tmp_path / "2_seed=2_abc" / "error.txt").write_text("what happened")
    job(tmp_path, "11_seed=11_abc", ["seed=11", "fan_in=4"], None)
    (tmp_path / "wandb").mkdir()
    rows = summarise(tmp_path)
    assert [row["job"] for row in rows] == ["0", "2", "10", "11"]
    with open(tmp_path / "summary.csv") as file:
        written = list(csv.DictReader(file))
    assert list(written[0]) == [
        *("job", "seed", "fan_in", "status", "test/acc", "test/acc_soft", "test/gap", "val/acc"),
        *("train/seconds", "directory"),
    ]
    assert [row["status"] for row in written] == ["done", "failed", "done", "interrupted"]
    assert written[0]["test/acc"] == "0.25"
    show(rows, tmp_path)
    printed = capsys.readouterr().out
    assert "25.00 %" in printed
    assert "fan_in=4" in printed, "what all jobs share is named once"
    assert "job 2 failed" in printed
