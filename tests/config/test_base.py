from __future__ import annotations

import pytest

from rayllm.config.base import BaseConfig
from rayllm.errors import ConfigError


class _Config(BaseConfig):
    size: int = 1


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^unknown setting 'sise'; did you mean 'size'\?$"):
        _Config.parse({"sise": 5})


def test_a_value_that_is_none_of_the_type_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^size='x': Input should be a valid integer[^\n]*$"):
        _Config.parse({"size": "x"})


def test_a_config_is_frozen() -> None:
    config = _Config.parse({"size": 3})
    with pytest.raises(ValueError, match="frozen"):
        config.size = 4
    assert config.size == 3
