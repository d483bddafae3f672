"""Work that may fail without stopping a training."""

import signal

import pytest

from training.optional_work import describe, optional_work
from training.stopping import Stopped


def test_an_error_becomes_a_sentence(capsys):
    with optional_work("The curves cannot be drawn"):
        raise OSError(28, "No space left")
    assert capsys.readouterr().err == (
        "The curves cannot be drawn: OSError: [Errno 28] No space left. The training is not affected.\n"
    )


def test_a_request_to_stop_stops():
    with pytest.raises(Stopped), optional_work("The curves cannot be drawn"):
        raise Stopped(signal.SIGTERM)


def test_errors_are_named_in_one_line():
    assert describe(ValueError("one\n  two.")) == "ValueError: one two"
    assert describe(KeyError()) == "KeyError"
