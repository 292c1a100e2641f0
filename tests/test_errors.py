"""Errors that a person meets, and how they are found behind what Ray wraps around them."""

import pickle

from pipeline.errors import InputError, nearest, root_input_error


class Wrapped(Exception):
    """As RayTaskError (``cause``) and Ray Train's WorkerGroupError (``worker_failures``) keep what was raised."""

    def __init__(self, cause: BaseException | None = None, failures: dict[int, BaseException] | None = None) -> None:
        super().__init__("wrapped")
        self.cause, self.worker_failures = cause, failures


def test_the_sentence_is_found_behind_every_wrapper():
    wrong = InputError("image 'a' has no label")
    assert root_input_error(wrong) is wrong
    assert root_input_error(Wrapped(cause=Wrapped(failures={0: OSError("x"), 1: wrong}))) is wrong
    outer = RuntimeError("outer")
    outer.__cause__ = wrong
    assert root_input_error(outer) is wrong
    assert root_input_error(Wrapped(cause=ValueError("not ours"))) is None
    assert root_input_error(None) is None


def test_a_circle_of_causes_ends():
    a, b = Wrapped(), Wrapped()
    a.cause, b.cause = b, a
    assert root_input_error(a) is None


def test_the_error_crosses_processes_unchanged():
    assert str(pickle.loads(pickle.dumps(InputError("wanted x, found y")))) == "wanted x, found y"


def test_nearest_names_all_that_is_known():
    assert nearest("widht", ["width", "depth"]) == " Did you mean 'width'? Known: depth, width."
    assert nearest("zzz", ["width"]) == " Known: width."
    assert nearest("x", []) == " Known: none."
