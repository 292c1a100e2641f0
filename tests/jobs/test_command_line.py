"""The command line: exit codes, one sentence for wrong input, no traceback, nothing twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from jobs.cli import app
from tests.training.test_ray_train import tree

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dubito(tmp_path, monkeypatch, capfd, ray_local):
    """Run a verb in this process, in a fresh working folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            app(args=list(args))
        said = capfd.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return run


def image(path: Path, size=(20, 16), mode="RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 1 if mode == "L" else (9, 9, 9)).save(path)


def refused(result: tuple[int, str, str], verb: str, rows: int = 0) -> str:
    """The message: one sentence, and with rejects a table of ``rows`` reasons."""
    code, out, err = result
    assert code == 2
    assert "Traceback" not in out + err
    lines = err.strip().splitlines()
    assert len(lines) == 1 + rows, err
    assert lines[0].startswith(f"dubito {verb}: ")
    assert lines[0] not in out
    return err


def test_wrong_input_is_one_sentence_and_exit_code_2(dubito, tmp_path):
    ingest = ["ingest", "--format", "masks", "--images", "pictures", "--labels", "masks", "--out", "data"]
    ingest += ["--classes", "cell,gap"]
    assert "pictures' not found" in refused(dubito(*ingest), "ingest")
    for name in ("a", "b", "c"):
        image(tmp_path / f"pictures/{name}.png")
    image(tmp_path / "masks/a.png", mode="L")
    image(tmp_path / "masks/b.png", size=(5, 5), mode="L")
    image(tmp_path / "masks/z.png", mode="L")
    assert "no_image" in refused(dubito(*ingest), "ingest", rows=1)
    (tmp_path / "masks/z.png").unlink()
    assert "the mask is 5x5" in refused(dubito(*ingest), "ingest", rows=1)
    assert "Did you mean 'masks'" in refused(dubito(*[w.replace("masks", "mask") for w in ingest]), "ingest")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree("data", "out", steps=2)))
    said = refused(dubito("train", str(config), "--set", "optim.lrr=1"), "train")
    assert "unknown key 'optim.lrr'. Did you mean 'lr'" in said
    assert "run dubito ingest first" in refused(dubito("train", str(config)), "train")
    said = refused(dubito("predict", "--bundle", "nowhere", "--data", "pictures", "--out", "p"), "predict")
    assert "nowhere" in said


def test_ingest_says_what_it_made_and_that_it_is_done_already(dubito, tmp_path):
    args = ["ingest", "--format", "demo", "--out", "data", "--set", "images=30"]
    code, out, err = dubito(*args)
    assert (code, err) == (0, "")
    assert "30 images (train 21, val 3, calibration 3, test 3)" in out
    made = json.loads((tmp_path / "data/dataset.json").read_text())
    assert made["counts"]["train"]["images"] == 21
    code, out, _ = dubito(*args)
    assert code == 0
    assert "done already" in out
    said = refused(dubito("ingest", "--format", "demo", "--out", "data", "--set", "images=31"), "ingest")
    assert "options.images was 30, now 31" in said


def test_a_failure_of_the_machine_names_the_log(dubito, monkeypatch):
    from pipeline.datasets import ingest as ingest_module

    def broken(*args, **kwargs):
        raise OSError("disk on fire")

    monkeypatch.setattr(ingest_module, "ingest", broken)
    code, out, err = dubito("ingest", "--format", "demo", "--out", "data")
    assert code == 1
    assert "disk on fire" in err
    assert "Traceback" not in err + out
    log = err.strip().rsplit(" ", 1)[-1]
    assert "Traceback" in Path(log).read_text()


def test_help_names_every_verb_and_starts_nothing():
    said = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "jobs.cli", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert said.returncode == 0
    for verb in ("ingest", "train", "ensemble", "evaluate", "predict", "demo"):
        assert verb in said.stdout
    assert " ray" not in said.stderr
    assert " torch" not in said.stderr


LAST = """
import os, sys
from jobs.session import run_job
sys.exit(run_job("predict", lambda terminal: os._exit(1) if sys.argv[1] == "dies" else terminal.say("done")))
"""


@pytest.mark.parametrize("how", ["dies", "ends"])
def test_a_process_that_ends_without_a_word_is_spoken_for(tmp_path: Path, how: str):
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", LAST, how], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root},
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    said = "dubito predict: ended from outside (Ray on this machine died, or a signal came); the same command goes on"
    assert (done.returncode == 1, done.stderr.startswith(said)) == (how == "dies", how == "dies")
    assert how == "dies" or (done.stdout, done.stderr) == ("done\n", "")
