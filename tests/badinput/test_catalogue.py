"""Every case of the catalogue is run, or waits with a reason."""

from __future__ import annotations

import pytest
from badinput.catalogue import ABSENT, CASES
from badinput.test_bad_model_folders import FOLDER_CASES
from badinput.test_bad_requests import REQUEST_CASES, SEQUENCES
from badinput.waiting import WAITING

pytestmark = pytest.mark.skipif(not CASES, reason=ABSENT)


def test_every_case_is_run_or_waits_with_a_reason() -> None:
    ids = [case["id"] for case in CASES]
    run = [case["id"] for case in (*REQUEST_CASES, *FOLDER_CASES)]
    assert len(ids) == len(set(ids))
    assert sorted([*run, *WAITING]) == sorted(ids)
    assert all(WAITING.values())


def test_every_sequence_that_is_run_is_one_of_the_catalogues() -> None:
    run = {case["request"]["special"] for case in REQUEST_CASES if "special" in case["request"]}
    assert run == set(SEQUENCES)
