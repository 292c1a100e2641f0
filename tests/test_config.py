"""Typed settings: what a person writes, and what the person reads when it is wrong."""

from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline import config
from pipeline.config import Settings, merge, parse_sets, read_yaml
from pipeline.errors import DoneError, InputError, nearest, root_input_error


class Optim(Settings):
    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    clip: float | Literal["off"] = "off"


class Run(Settings):
    out: str
    optim: Optim = Optim()
    extra: Optim | None = None
    members: list[Optim] = []
    size: tuple[int, int] = (96, 96)


def fault(values: dict) -> str:
    with pytest.raises(InputError) as caught:
        Run.parse(values, "run.yaml")
    return str(caught.value)


def test_defaults_are_filled_in_and_come_back_as_plain_types():
    run = Run.parse({"out": "x", "optim": {"lr": 1}}, "run.yaml")
    assert run.optim.lr == 1.0
    assert run.to_dict() == {
        "out": "x",
        "optim": {"name": "sgd", "lr": 1.0, "clip": "off"},
        "extra": None,
        "members": [],
        "size": [96, 96],
    }
    assert Run.parse(run.to_dict(), "config.json") == run


def test_settings_are_frozen():
    run = Run(out="x")
    with pytest.raises(ValidationError, match="frozen"):
        run.out = "y"  # pyright: ignore[reportAttributeAccessIssue]


def test_an_unknown_key_names_the_nearest_known_one():
    assert fault({"out": "x", "optin": {}}).startswith("run.yaml: unknown key 'optin'. Did you mean 'optim'?")
    assert fault({"out": "x", "optim": {"rl": 1}}) == (
        "run.yaml: unknown key 'optim.rl'. Did you mean 'lr'? Known: clip, lr, name."
    )


@pytest.mark.parametrize("where", [{"extra": {"namme": "sgd"}}, {"members": [{"namme": "sgd"}]}])
def test_the_nearest_key_is_found_inside_optionals_and_lists(where: dict):
    assert "Did you mean 'name'? Known: clip, lr, name." in fault({"out": "x", **where})


def test_a_missing_key_says_how_to_set_it():
    assert fault({}) == "run.yaml: 'out' is required; add it there or with --set out=..."


def test_a_wrong_value_is_quoted_under_the_key_that_was_written():
    assert fault({"out": "x", "optim": {"lr": "fast"}}).startswith("run.yaml: 'optim.lr' = 'fast': ")
    # pydantic's own location of a union is optim.clip.float
    assert fault({"out": "x", "optim": {"clip": "on"}}).startswith("run.yaml: 'optim.clip' = 'on': ")
    assert fault({"out": "x", "members": [{}, {"lr": []}]}).startswith("run.yaml: 'members.1.lr' = []: ")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-3", 3e-3),
        ("-1E4", -1e4),
        (".5", 0.5),
        ("12", 12),
        ("010", 10),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("null", None),
        ("", ""),
        ("s3://bucket/key", "s3://bucket/key"),
        ("a=b", "a=b"),
        ("[1e-3, x]", [1e-3, "x"]),
        ("{lr: 1e-3}", {"lr": 1e-3}),
        ("[unclosed", "[unclosed"),
    ],
)
def test_set_values_are_what_their_writer_meant(text: str, value: object):
    (found,) = parse_sets([f"key={text}"]).values()
    assert found == value
    assert type(found) is type(value)


@given(st.floats(allow_nan=False) | st.integers() | st.booleans() | st.none())
def test_any_scalar_that_python_prints_comes_back(value: object):
    text = {True: "true", False: "false", None: "null"}.get(value) if isinstance(value, bool | None) else None
    text = text or repr(value).replace("inf", ".inf")
    assert parse_sets([f"a.b={text}"]) == {"a": {"b": value}}


def test_sets_build_one_tree():
    assert parse_sets(["a.b=1", "a.c=2", "d=3", "a.b=4"]) == {"a": {"b": 4, "c": 2}, "d": 3}


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["lr"], "--set wants key=value, found 'lr'"),
        (["=1"], "--set wants key=value, found '=1'"),
        (["a..b=1"], "'a..b' has an empty part"),
        (["a=1", "a.b=2"], "'a' was already set to a plain value"),
    ],
)
def test_a_set_that_says_nothing_is_refused(pairs: list[str], message: str):
    with pytest.raises(InputError) as caught:
        parse_sets(pairs)
    assert message in str(caught.value)


def test_merge_lays_leaves_on_top_and_leaves_both_inputs_alone():
    base, over = {"a": {"x": 1, "y": 2}, "b": [1, 2]}, {"a": {"x": 3}, "b": [4]}
    assert merge(base, over) == {"a": {"x": 3, "y": 2}, "b": [4]}
    assert base == {"a": {"x": 1, "y": 2}, "b": [1, 2]}
    assert over == {"a": {"x": 3}, "b": [4]}


def test_merge_drops_the_settings_of_a_model_that_is_replaced():
    base = {"model": {"name": "unet", "width": 16}}
    assert merge(base, {"model": {"name": "smp"}}) == {"model": {"name": "smp"}}
    assert merge(base, {"model": {"name": "unet", "depth": 3}})["model"] == {
        "name": "unet",
        "width": 16,
        "depth": 3,
    }
    assert merge({"model": {"width": 16}}, {"model": {"name": "unet"}})["model"] == {
        "width": 16,
        "name": "unet",
    }


_leaf = st.integers(0, 3)
_inner = st.dictionaries(st.sampled_from("ab"), _leaf, max_size=2)
_mapping = st.dictionaries(st.sampled_from("abc"), _leaf | _inner, max_size=3)


@given(_mapping, _mapping, _mapping)
def test_merge_is_associative_and_has_an_identity(a: dict, b: dict, c: dict):
    assert merge(a, {}) == a == merge({}, a)
    assert merge(a, a) == a
    kinds = {key: {isinstance(x[key], dict) for x in (a, b, c) if key in x} for key in "abc"}
    if all(len(kind) <= 1 for kind in kinds.values()):
        assert merge(merge(a, b), c) == merge(a, merge(b, c))


def test_yaml_that_is_no_mapping_or_no_yaml_is_refused():
    assert read_yaml("optim: {lr: 3e-3}\nyes: no", "r") == {"optim": {"lr": 3e-3}, "yes": "no"}
    with pytest.raises(InputError, match="^run.yaml: wanted a mapping of settings, found list$"):
        read_yaml("- 1", "run.yaml")
    with pytest.raises(InputError, match="^run.yaml: wanted a mapping of settings, found NoneType$"):
        read_yaml("", "run.yaml")
    with pytest.raises(InputError, match="^run.yaml: not valid YAML: .*line 1"):
        read_yaml("a: [1", "run.yaml")
    with pytest.raises(InputError, match="not valid YAML"):
        read_yaml("a: !!python/object/apply:os.getcwd []", "run.yaml")


def test_other_users_of_yaml_keep_their_reading():
    assert yaml.safe_load("a: no") == {"a": False}


def test_load_lays_sets_on_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("out: here\noptim: {lr: 0.5}\n", encoding="utf-8")
    assert config.load(str(file), ["optim.lr=1e-2", "data=s3://b/d"]) == {
        "out": "here",
        "optim": {"lr": 0.01},
        "data": "s3://b/d",
    }
    with pytest.raises(InputError, match=r"config file '.*none.yaml' not found; examples are in jobs/configs/"):
        config.load(str(tmp_path / "none.yaml"), [])


def test_nearest_without_a_close_name_lists_the_known_ones():
    assert nearest("zzz", ["b", "a"]) == " Known: a, b."
    assert nearest("x", []) == " Known: none."


def test_the_input_error_inside_a_chain_is_found():
    inner, outer, wrapped = (
        InputError("wanted this"),
        RuntimeError("task failed"),
        RuntimeError("as Ray does"),
    )
    outer.__cause__ = inner
    wrapped.cause = outer  # pyright: ignore[reportAttributeAccessIssue]
    assert root_input_error(wrapped) is inner
    assert root_input_error(DoneError("x")) is None
    assert root_input_error(None) is None
    loop = RuntimeError("a")
    loop.__cause__ = RuntimeError("b")
    loop.__cause__.__cause__ = loop
    assert root_input_error(loop) is None
