from __future__ import annotations

import pickle

import pytest

from rayllm.errors import OverloadedError, WorkerDiedError, did_you_mean, without_paths


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
    assert did_you_mean("Top_P", ["top_k", "top_p"]) == "; did you mean 'top_p'?"


@pytest.mark.parametrize(
    "word", ["truncation_side", "truncation", "use_beam_search", "kv_cache_dtype", "user_id", "id"]
)
def test_a_word_that_is_merely_like_another_is_not_suggested(word: str) -> None:
    assert did_you_mean(word, ["functions", "function_call", "user", "n", "best_of", "cache_salt", "seed"]) == ""


def test_the_only_word_that_begins_so_is_suggested() -> None:
    known = ["gpu_memory_utilization", "max_num_seqs", "max_model_len"]
    assert did_you_mean("gpu_memory", known) == "; did you mean 'gpu_memory_utilization'?"
    assert did_you_mean("max", known) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("OSError: no such file: '/models/a b/x.bin'", "OSError: no such file: 'a b/x.bin'"),
        ("/srv/qwen/model.safetensors: tensor 'a' has shape [1/2]", "model.safetensors: tensor 'a' has shape [1/2]"),
        ("node 12ab, host 10.0.0.1; 3/4 done at 5 tokens/s, see http://example.org/a/b", None),
        ("read ~/models/x and ../y/z, C:\\models\\q", "read x and z, q"),
    ],
)
def test_file_paths_are_cut_to_their_last_name(text: str, shown: str | None) -> None:
    assert without_paths(text) == (shown or text)
