from __future__ import annotations

import pytest

from rayllm.config import parse_settings
from rayllm.errors import ConfigError


def test_settings_go_to_the_config_that_has_them() -> None:
    engine, server = parse_settings({"max_num_seqs": 3, "port": 9})
    assert (engine.max_num_seqs, server.port) == (3, 9)


@pytest.mark.parametrize(("name", "nearest"), [("max_num_seq", "max_num_seqs"), ("prt", "port")])
def test_an_unknown_setting_names_the_nearest_of_both(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown setting '{name}'; did you mean '{nearest}'"):
        parse_settings({name: 1})
