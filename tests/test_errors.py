from __future__ import annotations

import pickle

import pytest

from rayllm.errors import OverloadedError, WorkerDiedError, did_you_mean


@pytest.mark.parametrize(
    ("error", "text"),
    [(WorkerDiedError(1, "killed"), "worker rank 1 failed: killed"), (OverloadedError("full", 2.5), "full")],
)
def test_an_error_survives_the_way_between_processes(error: Exception, text: str) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)
    assert str(copy) == str(error) == text


def test_the_nearest_word_is_named_only_where_one_is_near() -> None:
    assert did_you_mean("temprature", ["top_p", "temperature"]) == "; did you mean 'temperature'?"
    assert did_you_mean("zzz", ["top_p", "temperature"]) == ""
