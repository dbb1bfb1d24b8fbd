from __future__ import annotations

import pytest

from rayllm.config import EngineConfig, GenerationDefaults
from rayllm.errors import ConfigError


def test_defaults_that_are_set_are_given_and_shown_with_their_source() -> None:
    defaults = GenerationDefaults(temperature=0.5, top_k=3, max_tokens=9, source="file")
    assert defaults.sampling_fields() == {"temperature": 0.5, "top_k": 3}
    assert defaults.described() == "temperature 0.5, top_k 3, max_tokens 9 (file)"
    assert GenerationDefaults(source="file").described() == ""


@pytest.mark.parametrize("given", ['{"temperature": 0.5}', {"temperature": 0.5}])
def test_an_override_is_an_object_or_its_text(given: object) -> None:
    assert (
        EngineConfig.parse({"override_generation_config": given}).override_generation_config == '{"temperature": 0.5}'
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [("{", "give a JSON object"), ("[1]", "give a JSON object"), ('{"temprature": 1}', "did you mean 'temperature'")],
)
def test_an_override_that_is_no_object_of_known_fields_is_refused(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.parse({"override_generation_config": given})
