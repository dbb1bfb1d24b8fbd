"""Bad model folders, by the catalogue: refused before anything is served, in one line that names the file.

Each folder goes through the command line's own check and is then loaded in this process, by the code that an ingress
and a worker run. No folder may run code, connect to anything, or take much memory.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from badinput.catalogue import ABSENT, CASES
from badinput.folders import copy_of, spoil
from badinput.waiting import WAITING

from rayllm.cli.serve import parse_serve
from rayllm.cli.serving import check_before_start
from rayllm.errors import ConfigError, RequestError
from rayllm.llm import LLM
from rayllm.request import SamplingParams

pytestmark = [pytest.mark.skipif(not CASES, reason=ABSENT), pytest.mark.timeout(60)]

FOLDER_CASES = [case for case in CASES if case["kind"] == "file" and case["id"] not in WAITING]
_MAX_GROWTH_KIB = 512 * 1024
_CHAT_LIMIT_S = 20
"""The catalogue says 5 s; machines that run tests are busy."""


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a model folder is loaded without network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def _load(folder: Path) -> LLM:
    engine, server = parse_serve([str(folder), "--port", "0", "--num-kv-blocks", "64"])
    check_before_start(engine, server)
    return LLM(str(folder), num_kv_blocks=64, max_model_len=engine.max_model_len, device="cpu")


@pytest.mark.parametrize("case", FOLDER_CASES, ids=[case["id"] for case in FOLDER_CASES])
def test_a_bad_model_folder_is_refused_or_served_as_the_catalogue_says(
    case: dict[str, Any], llama_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, marker = copy_of(llama_path, tmp_path / "model"), tmp_path / "marker"
    ops, expected = case["file_recipe"]["ops"], case["expected"]
    for op in ops:
        spoil(folder, op, marker)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal = ""
    with caplog.at_level(logging.WARNING):
        try:
            llm = _load(folder)
        except ConfigError as error:
            refusal = str(error)
        else:
            with llm:
                _serve(llm)
    assert not marker.exists(), "code of the folder has run"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < _MAX_GROWTH_KIB
    start = expected["start"]
    if start in ("refuse", "serve"):
        assert bool(refusal) == (start == "refuse"), refusal
    assert len(refusal.splitlines()) <= 1, refusal
    if expected.get("message_names_file"):
        assert any(Path(op["file"]).name in refusal for op in ops), refusal
        fields = [field for op in ops if op["op"] == "json_set" for field in op["set"]]
        assert all(field in refusal for field in fields) or "architecture" in refusal, refusal
    if start == "refuse_or_warn":
        names = [name for op in ops for name in op.get("add", ())]
        assert all(name in refusal + caplog.text for name in names)


def _serve(llm: LLM) -> None:
    """What must hold of a model that is let in: completions answer, chats answer or are refused in time."""
    [output] = llm.generate(["a" * 30], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 2
    started_s = time.monotonic()
    with contextlib.suppress(RequestError):
        llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=2))
    assert time.monotonic() - started_s < _CHAT_LIMIT_S


def test_a_token_beyond_the_models_vocabulary_costs_only_the_prompt_that_holds_it(
    llama_path: Path, tmp_path: Path
) -> None:
    folder = copy_of(llama_path, tmp_path / "model")
    spoil(folder, {"op": "tok_add", "file": "tokenizer.json", "tokens": [["<beyond>", 1_000_000]]}, tmp_path)
    with _load(folder) as llm:
        with pytest.raises(RequestError, match="out of vocabulary, which has 288 tokens"):
            llm.generate(["a<beyond>"], SamplingParams(max_tokens=2))
        _serve(llm)
