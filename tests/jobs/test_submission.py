"""What is looked at and packed before anything is sent to a cluster, and how its output comes back."""

import io
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import app
from jobs.submission import client, pinned_versions, visible_paths, working_tree
from jobs.submission.request import Request
from pipeline import environment
from pipeline.errors import InputError
from pipeline.runtime.json_log import JsonLog, JsonLogReplay, job_output
from pipeline.runtime.progress import Terminal


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a config, ignored data and a large name that git quotes."""
    for name, text in {
        "config.yaml": "data: s3://b/d\nout: s3://b/o\ntrain: {steps: 1}\n",
        "lists/train.txt": "a\n",
        "käse datei.txt": "x",
        "data/big.bin": "0" * 1000,
        ".venv/lib.py": "",
        ".gitignore": "data/\n.venv/\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


TRACKED = [".gitignore", "config.yaml", "käse datei.txt", "lists/train.txt"]


def test_the_tree_is_what_git_would_track(project: Path):
    assert working_tree.files(project) == TRACKED, "a folder without a repository"
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    assert working_tree.files(project) == TRACKED
    subprocess.run(["git", "add", "config.yaml"], cwd=project, check=True)
    assert working_tree.files(project) == TRACKED
    (project / "config.yaml").unlink()
    assert working_tree.files(project) == [name for name in TRACKED if name != "config.yaml"], (
        "deleted, not yet committed"
    )
    assert working_tree.root_of(project / "lists") == project


def test_without_git_caches_and_environments_stay_here(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert working_tree.files(project) == sorted([*TRACKED, "data/big.bin"])


def test_the_package_depends_on_names_and_contents_alone(project: Path, tmp_path: Path):
    one = working_tree.pack(project, TRACKED, tmp_path / "1.zip")
    (project / "config.yaml").touch()
    assert working_tree.pack(project, TRACKED, tmp_path / "2.zip") == one
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert archive.namelist() == TRACKED
        assert archive.read("käse datei.txt") == b"x"
    (project / "config.yaml").write_text("task: detection\n")
    assert working_tree.pack(project, TRACKED, tmp_path / "3.zip") != one


def test_a_tree_that_is_too_large_names_what_is(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(working_tree, "MAX_BYTES", 300)
    with pytest.raises(InputError, match=r"more than 0 MB.*\.gitignore \(the largest: data/big.bin 0.0 MB, "):
        working_tree.pack(project, [*TRACKED, "data/big.bin"], tmp_path / "x.zip")


@pytest.mark.parametrize(
    ("value", "written", "fine"),
    [
        ("s3://bucket/x", True, True),
        ("/mnt/x", True, True),
        ("lists", False, True),
        ("./lists/train.txt", False, True),
        ("lists", True, False),
        ("data", False, False),
        ("list", False, False),
    ],
)
def test_places_are_ones_that_the_cluster_sees(value: str, written: bool, fine: bool):
    if fine:
        visible_paths.require_visible("--x", value, TRACKED, written=written)
        return
    with pytest.raises(InputError, match=r"--x = '.*' is a path of this machine \(.*give an s3:// or gs:// URI"):
        visible_paths.require_visible("--x", value, TRACKED, written=written)


def test_a_config_travels_and_names_places_of_the_cluster(project: Path):
    config = str(project / "config.yaml")
    assert visible_paths.require_visible_config(config, [], project, TRACKED) == "config.yaml"
    with pytest.raises(InputError, match="out = 'runs/1' is a path of this machine"):
        visible_paths.require_visible_config(config, ["out=runs/1"], project, TRACKED)
    with pytest.raises(InputError, match="transfer.weights = 'w.safetensors' is a path of this machine"):
        visible_paths.require_visible_config(config, ["transfer.weights=w.safetensors"], project, TRACKED)
    with pytest.raises(InputError, match=r"config '.*' does not travel with the working tree"):
        visible_paths.require_visible_config(config, [], project, [])


def request_of(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """What ``dubito LINE --submit http://x:1`` would send."""
    requests: list[Request] = []

    def keep(verb: str, make_request: Any, cluster: client.Cluster) -> int:
        assert cluster.address == "http://x:1"
        requests.append(make_request())
        return 0

    monkeypatch.chdir(folder)
    monkeypatch.setattr(client, "run", keep)
    with pytest.raises(SystemExit) as ended:
        app([*line.split(), "--submit", "http://x:1"])
    assert ended.value.code == 0
    return requests[0]


def test_the_command_arrives_as_it_was_given(project: Path, monkeypatch: pytest.MonkeyPatch):
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    line = "ensemble config.yaml --members 3 --resume --set train.steps=5 --set optim.lr=0.1"
    request = request_of(line, project, monkeypatch)
    assert request.entrypoint == (
        "python -m jobs.cli ensemble config.yaml --members 3 --resume --set train.steps=5 --set optim.lr=0.1"
    )
    request = request_of(f"train {project / 'config.yaml'}", project / "lists", monkeypatch)
    assert request.arguments == ["config.yaml"], "as seen from the tree's root, where the job begins"
    line = "ingest --format voc --images s3://b/i --labels /mnt/l --splits train.txt --out s3://b/d"
    request = request_of(line, project / "lists", monkeypatch)
    given = dict(zip(request.arguments[::2], request.arguments[1::2], strict=True))
    assert given == {
        "--format": "voc",
        "--images": "s3://b/i",
        "--labels": "/mnt/l",
        "--splits": "lists/train.txt",
        "--out": "s3://b/d",
    }


def test_every_verb_but_the_demo_can_be_submitted():
    import typer

    group: Any = typer.main.get_command(app)
    flags = {name: {p.name for p in command.params} for name, command in group.commands.items()}
    assert {name for name, names in flags.items() if "submit" not in names} == {"demo", "jobs", "registry"}


def test_pins_are_those_of_the_tree_and_are_checked_where_the_job_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "constraints.txt").write_text("# tested\ntorch==9.9.9  # not yet\nkornia_rs==1\n")
    wanted = pinned_versions.versions_of(tmp_path)
    assert wanted["torch"] == "9.9.9"
    assert wanted["ray"].startswith("2."), "what is not pinned is as installed here"
    assert "pytest" not in wanted
    monkeypatch.delenv(environment.PINNED_VERSIONS, raising=False)
    pinned_versions.require_pinned_versions()
    monkeypatch.setenv(environment.PINNED_VERSIONS, json.dumps(pinned_versions.versions_of(tmp_path / "nowhere")))
    pinned_versions.require_pinned_versions()
    monkeypatch.setenv(environment.PINNED_VERSIONS, json.dumps(wanted | {"nonsense-package": "1"}))
    with pytest.raises(
        InputError, match=r"the cluster has torch 2\.[^ ]+ instead of 9\.9\.9, nonsense-package missing"
    ):
        pinned_versions.require_pinned_versions()


def test_no_credential_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheim")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "geheim")
    monkeypatch.setenv("DUBITO_STORAGE_PATIENCE_S", "7")
    runtime = client.runtime_environment(
        tmp_path, "job", tmp_path / "t.zip", client.Cluster("http://x:1", environment="install")
    )
    assert "geheim" not in json.dumps(runtime)
    assert runtime["env_vars"]["DUBITO_STORAGE_PATIENCE_S"] == "7"
    assert runtime["env_vars"]["DUBITO_LOG"] == "json"
    assert any(each.startswith("torch==") for each in runtime["pip"]["packages"])
    assert not any(each.startswith("ray==") for each in runtime["pip"]["packages"])


def test_lines_come_back_as_bars_and_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sent = io.StringIO()
    lines = JsonLog("train", "job-1", sent)
    lines.say("a [bold] message")
    for done in range(0, 101):
        lines.update("train", done, 100, unit="steps")
    lines.fail("it broke", "Traceback: ...")
    events = [json.loads(line) for line in sent.getvalue().splitlines()]
    assert all(event["run"] == "job-1" and event["verb"] == "train" for event in events)
    assert [event["done"] for event in events if event["level"] == "progress"] == [0, 100], "once a second, and the end"
    out, err, log = io.StringIO(), io.StringIO(), tmp_path / "log"
    replay = JsonLogReplay(Terminal(out, err, log))
    text = "INFO of Ray\n" + sent.getvalue() + '{"time": "not ours"}\nlast'
    for start in range(0, len(text), 7):
        replay.feed(text[start : start + 7])
    replay.close()
    assert out.getvalue() == "a [bold] message\n"
    assert err.getvalue() == f"it broke; the whole story is in {log}\n"
    assert log.read_text() == "Traceback: ..."
    assert list(replay.chatter) == ["INFO of Ray", '{"time": "not ours"}', "last"]
    assert "INFO of Ray" in capsys.readouterr().out


def test_a_job_speaks_json_where_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    out = io.StringIO()
    monkeypatch.delenv("DUBITO_LOG", raising=False)
    assert job_output("train") is Terminal
    monkeypatch.setenv("DUBITO_LOG", "json")
    monkeypatch.delenv("DUBITO_RUN", raising=False)
    job_output("train")(out, out, tmp_path / "train-1.log").say("hello")
    assert json.loads(out.getvalue())["run"] == "train-1"


def test_addresses_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="'localhost': wanted the address of a cluster's dashboard"):
        client.connect("localhost")
    with pytest.raises(InputError, match=r"no Ray cluster answers at http://127.0.0.1:9 \("):
        client.connect("http://127.0.0.1:9")
