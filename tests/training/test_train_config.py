"""The tree of settings: what it refuses, and how long a run is."""

import json
from pathlib import Path

import pytest

import jobs
from pipeline.config import load, merge, parse_sets
from pipeline.errors import InputError
from pipeline.training.train_config import TrainConfig

TREE = {
    "task": "segmentation",
    "data": "d",
    "out": "o",
    "model": {"name": "unet", "width": 4},
    "input": {"size": [32, 32]},
    "train": {"epochs": 2, "batch_size": 4},
}


def with_sets(*pairs: str) -> TrainConfig:
    return TrainConfig.parse(merge(TREE, parse_sets(list(pairs))), "config.yaml")


def test_a_misspelt_key_names_the_nearest():
    with pytest.raises(InputError, match=r"config.yaml: unknown key 'optim.learning'.*Known: .*lr"):
        with_sets("optim.learning=1")
    with pytest.raises(InputError, match=r"unknown key 'train.bach_size'. Did you mean 'batch_size'"):
        with_sets("train.bach_size=1")


def test_model_and_task_must_fit():
    with pytest.raises(InputError, match="no model.*Did you mean 'unet'"):
        with_sets("model={name: unett}")
    with pytest.raises(InputError, match="'anchor_free' is for detection, but task is segmentation; choose one of smp"):
        with_sets("model={name: anchor_free}")
    with pytest.raises(InputError, match="unknown key 'widht'|'model.widht'|Did you mean 'width'"):
        with_sets("model.widht=3")


def test_epochs_or_steps_but_one_of_them():
    with pytest.raises(InputError, match="exactly one of epochs and steps"):
        with_sets("train.steps=3")
    assert with_sets("train.epochs=null", "train.steps=7", "train.workers=2").length(100) == (56, 8)
    assert with_sets("train.workers=2", "train.accumulate=3").length(100) == (200, 24)
    assert with_sets().validate_every(100, 8) == 12
    assert with_sets().validate_every(3, 8) == 1


def test_resolved_holds_every_default_and_parses_back():
    tree = with_sets().resolved()
    assert tree["optim"]["lr"] > 0
    assert tree["model"]["depth"] >= 2
    assert TrainConfig.parse(tree, "x").resolved() == tree


def test_losses_and_predictions_are_stored_as_written():
    tree = with_sets("loss={dice: 1, cross_entropy: 2}", "predict={maps: false, dropout_passes: 3}").resolved()
    assert json.dumps(tree["loss"]) == '{"dice": 1, "cross_entropy": 2}'
    assert json.dumps(tree["predict"]) == '{"maps": false, "dropout_passes": 3}'
    detector = with_sets("task=detection", "model={name: anchor_free}", "predict.score_threshold=0")
    assert json.dumps(detector.resolved()["loss"]) == '{"name": "aligned"}'
    assert json.dumps(detector.with_absolute_uris().resolved()["predict"]) == '{"score_threshold": 0}'


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["loss.dise=1"], "config.yaml: loss: unknown name 'dise'. Did you mean 'dice'?"),
        (["loss.focal.gama=1"], "config.yaml: loss.focal: unknown key 'gama'. Did you mean 'gamma'?"),
        (["loss=3"], "config.yaml: 'loss' = 3: Input should be a valid dictionary"),
        (["predict.patches=3"], "config.yaml: predict: unknown key 'patches'. Did you mean 'patch'?"),
        (["predict.tta.flip=true"], "config.yaml: predict: unknown key 'tta.flip'. Did you mean 'flips'?"),
        (
            ["task=detection", "model={name: yolo_v1}", "loss.name=aligned"],
            "config.yaml: loss.name: 'aligned' does not fit model 'yolo_v1', which is trained by yolo_v1",
        ),
        (["task=detection", "model={name: yolo_v1}", "predict.windows=always"], "config.yaml: predict.windows: always"),
        (["model.width=0"], "config.yaml: model: 'width' = 0: Input should be greater"),
        (["model.depht=3"], "config.yaml: model: unknown key 'depht'. Did you mean 'depth'?"),
        (["task=segmentaton"], "config.yaml: 'task' = 'segmentaton': Input should be 'segmentation' or 'detection'"),
        (["transfer.init=frozen"], "config.yaml: transfer.init = frozen wants weights"),
    ],
)
def test_every_branch_is_checked_when_the_config_is_parsed(sets: list[str], message: str):
    with pytest.raises(InputError) as error:
        with_sets(*sets)
    assert str(error.value).startswith(message)


def test_a_missing_config_file_says_where_examples_are():
    with pytest.raises(InputError, match="'nowhere.yaml' not found; examples are in jobs/configs"):
        load("nowhere.yaml", [])


FOLDER = Path(jobs.__file__).parent / "configs"
RESOLVED = Path(__file__).resolve().parents[1] / "data/resolved_configs"
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "retrain")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_example_configs_are_valid(path):
    TrainConfig.parse(load(str(path), []), str(path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_stored_configs_stay_as_they_are(path: Path):
    """A run that an earlier version began resumes only where its config resolves to the same bytes."""
    stored = (RESOLVED / f"{path.stem}.json").read_text("utf-8")
    assert json.dumps(TrainConfig.parse(load(str(path), []), path.name).resolved()) + "\n" == stored


def test_there_are_configs_of_both_tasks():
    assert {load(str(path), [])["task"] for path in CONFIGS} == {"segmentation", "detection"}


def test_mixup_is_for_boxes():
    with pytest.raises(InputError, match=r"augment\.mixup blends two images, and masks cannot"):
        with_sets("augment.mixup=0.5")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_fewer_workers_make_the_same_step_where_whole_batches_allow(world: int):
    settings = with_sets("train.workers=4", "train.min_workers=1", "train.accumulate=3").train
    scale = settings.scaled(world)
    assert scale.images == 4 * scale.accumulate * world
    assert scale.images == 48, "12 batches of 4 are 12, 6, 4 or 3 on each of 1, 2, 3 or 4 workers"
    assert scale.ratio == scale.lr == 1


@pytest.mark.parametrize(("rule", "factor"), [("linear", 0.25), ("sqrt", 0.5), ("none", 1.0)])
def test_smaller_steps_have_smaller_rates(rule: str, factor: float):
    sets = ("train.workers=4", "train.min_workers=1", "train.elastic_batch=local", f"train.elastic_lr={rule}")
    scale = with_sets(*sets).train.scaled(1)
    assert (scale.accumulate, scale.images, scale.ratio, scale.lr) == (1, 4, 0.25, factor)


def test_the_least_workers_are_not_more_than_all():
    with pytest.raises(InputError, match="min_workers = 3 is more than workers = 2"):
        with_sets("train.workers=2", "train.min_workers=3")


def test_the_example_of_retraining_is_valid(monkeypatch: pytest.MonkeyPatch):
    from jobs.retrain import _settings

    monkeypatch.chdir(FOLDER.parents[1])
    settings, tracking = _settings(str(FOLDER / "retrain.yaml"), [])
    config = TrainConfig.parse({**settings.recipe, "data": "d", "out": "o"}, "retrain.yaml")
    assert config.task == "detection"
    assert json.dumps(config.resolved()) + "\n" == (RESOLVED / "retrain.json").read_text("utf-8")
    assert tracking is None
