"""What a person sees on the command line; a process costs seconds, so each test looks at much."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from difflut_lab.training.cli import _with_quotes

ROOT = Path(__file__).parents[2]
QUICK = ["model.widths=[20]", "trainer=cpu", "trainer.max_epochs=1", "data.val_fraction=0.5"]


def start(*words: str, cwd: Path = ROOT, script: str = "train.py", **environment: str):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *words],
        capture_output=True, text=True, timeout=300, cwd=cwd, env=os.environ | environment,
    )  # fmt: skip


def inspect(run):
    """Configuration and summary of an offline wandb run."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(run)]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    (about,) = (record["run"] for record in records if record["type"] == "run")
    summary: dict[str, float] = {}
    for record in records:
        if record["type"] == "summary":
            summary |= record["summary"]["update"]
    steps = {
        record["metric"]["glob_name"]: record["metric"]["step_metric"]
        for record in records
        if record["type"] == "metric" and "glob_name" in record["metric"]
    }
    return about, summary, steps


def test_a_run_tells_what_it_does_and_wandb_can_read_it_back(tmp_path):
    result = start("layer=random_routing", *QUICK, f"hydra.run.dir={tmp_path}/run", WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    for word in ("random_routing", "thermometer", "epoch 1/1", "test accuracy, hard", "20", str(tmp_path)):
        assert word in result.stdout
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    about, summary, steps = inspect(offline)
    assert about["config"]["update"]["layer_config"]["grad_stabilization"] == "none"
    assert about["display_name"].startswith("layer=random_routing model.widths=[20]")
    assert {"random_routing", "dwn", "digits"} <= set(about["tags"])
    assert summary["test/acc"] == pytest.approx(metrics["test/acc"])
    assert steps["val/*"] == "epoch"
    assert steps["schedule/*"] == "epoch"
    assert len(list((offline / "files" / "media" / "images").glob("wiring*.png"))) == 1
    evaluated = start(f"ckpt={tmp_path}/run/checkpoints/best.ckpt", script="scripts/evaluate.py")
    assert f"{100 * metrics['test/acc']:.2f} %" in evaluated.stdout
    assert f"{100 * metrics['test/acc_soft']:.2f} %" in evaluated.stdout


def test_a_sweep_with_a_plugin_and_a_failing_job_ends_with_one_table(tmp_path):
    (tmp_path / "my_layers.py").write_text((ROOT / "examples" / "my_layers.py").read_text())
    result = start(
        "plugins=[my_layers]", "layer=my_custom_layer", "layer.foo=3", "-m", "layer_config.flip_probability=0,2,0.1",
        "logger=none", *QUICK, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 1, "a failed job is told by the exit status, too"
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    with open(sweep / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer_config.flip_probability"] for row in rows] == ["0", "2", "0.1"]
    assert {row["layer.foo"] for row in rows} == {"3"}
    assert [row["status"] for row in rows] == ["done", "failed", "done"]
    assert "3 trainings" in result.stdout
    assert "layer_config.flip_probability=2: must be at least 0 and at most 1." in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert (sweep / rows[1]["directory"] / "error.txt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hydra.run.dir=used"], "Error: hydra.run.dir=used: holds another run already"),
        (["layer=random_ruting"], "Error: Unknown layer 'random_ruting'. Did you mean 'random_routing'? Choices: "),
        (["node.n=20"], "Error: node.n=20: "),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line_and_a_status(words, message, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.yaml").write_text("")
    result = start(*words, cwd=tmp_path)
    assert result.returncode != 0
    assert not any((tmp_path / "outputs").glob("*/*")), "nothing is left behind"
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_help_lists_groups_and_choices_of_plugins_too(tmp_path):
    (tmp_path / "my_layers.py").write_text((ROOT / "examples" / "my_layers.py").read_text())
    result = start("plugins=[my_layers]", "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (
        "layer: conv_lut, feature_wise_groups, learnable_routing, my_custom_layer, my_layer, random_routing"
        in result.stdout
    )
    assert "experiment" in result.stdout


def test_names_of_run_directories_are_taken_as_they_are_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/2026_layer=random_routing,model.widths=1,it's~_02ca")
    run.mkdir(parents=True)
    parse = OverridesParser.create().parse_override
    for key in ("ckpt", "distillation.ckpt", "+data.root"):
        assert parse(_with_quotes(f"{key}={run}")).value() == str(run)
    # a path that is not there is for the reader of checkpoints to complain about
    assert parse(_with_quotes("ckpt=a=1,b~/last.ckpt")).value() == "a=1,b~/last.ckpt"
    for word in ("-m", "--cfg=job", "seed=1,2", "distillation.ckpt=null,best.ckpt", "ckpt='a=1'", "ckpt=last.ckpt"):
        assert _with_quotes(word) == word
    assert _with_quotes(_with_quotes(f"ckpt={run}")) == _with_quotes(f"ckpt={run}")


def test_a_stopped_run_says_how_to_continue(tmp_path):
    words = [*QUICK[:2], "trainer.max_epochs=100000", "scheduler=none", "logger=none", f"hydra.run.dir={tmp_path}/run"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert f"continue with the same settings and ckpt={last}" in output
    assert "Traceback" not in errors


@pytest.mark.slow
def test_two_processes_train_together(tmp_path):
    words = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_epochs=2", "model.widths=[50]"]
    result = start(*words, "logger=none", f"hydra.run.dir={tmp_path}/run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("test accuracy, hard") == 1, "only the first process prints"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["epochs"] == 2
    with open(tmp_path / "run" / "history.csv") as file:
        assert len(list(csv.DictReader(file))) == 2
