"""`/tokenizer_info`: the settings of the served tokenizer, as vLLM shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rayllm.api.service import ServedModel
from rayllm.errors import RequestError

_FILES = ("vocab_file", "merges_file", "tokenizer_file", "name_or_path")
"""Settings that name files of this machine."""
_MAX_INTEGER = 2**53 - 1
"""What JSON's readers agree on; "no limit" is often written as 10**30."""


def tokenizer_info(model: ServedModel) -> dict[str, Any]:
    """The fields of tokenizer_config.json, tokens as their texts, with `tokenizer_class` and the template in use.
    Raises `RequestError` (404) where the operator did not ask for it."""
    if not model.config.engine.enable_tokenizer_info_endpoint:
        raise RequestError(
            "/tokenizer_info is off; the server's operator turns it on with --enable-tokenizer-info-endpoint",
            code="path_not_found",
            status=404,
        )
    file = Path(model.config.tokenizer_path) / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    info = {name: _plain(value) for name, value in settings.items() if name not in _FILES}
    info.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    if model.tokenizer.chat_template is not None:
        info["chat_template"] = model.tokenizer.chat_template.source
    return info


def _plain(value: Any) -> Any:
    """Added tokens, which are objects in the file, as their texts."""
    if isinstance(value, dict):
        if "content" in value:
            return value["content"]
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) > _MAX_INTEGER:
        return _MAX_INTEGER
    return value
