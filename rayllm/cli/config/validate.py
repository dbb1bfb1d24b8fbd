"""`rayllm config validate FILE`: whether `rayllm serve --config FILE` would start, as far as can be told before."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rayllm.cli.flags import Parser
from rayllm.cli.vllm_flags import translate_setting
from rayllm.config import parse_settings
from rayllm.errors import ConfigError
from rayllm.settings_file import read_settings_file


def parser() -> Parser:
    made = Parser(prog="rayllm config validate", description="Check a YAML file of settings, and its model's folder.")
    made.add_argument("file", metavar="FILE", help="as for 'rayllm serve --config'")
    made.add_argument("--json", action="store_true", help="print one line of JSON")
    return made


def run(argv: Sequence[str]) -> int:
    """0 for a file that holds; 2 and the reason for one that does not."""
    given = parser().parse(argv)
    try:
        num_settings, model = check(given["file"])
    except ConfigError as error:
        if not given.get("json"):
            raise
        print(json.dumps({"file": given["file"], "valid": False, "reason": str(error)}))
        return 2
    if given.get("json"):
        print(json.dumps({"file": given["file"], "valid": True, "model": model, "num_settings": num_settings}))
    else:
        print(f"{given['file']} is valid: {num_settings} settings, model {model}")
    return 0


def check(path: str) -> tuple[int, str]:
    """How many settings the file has, and what its model is called. `ConfigError` for the first thing wrong."""
    from rayllm.engine.owner.resolve import resolve

    settings = read_settings_file(path, lambda name, value: translate_setting(name, value)[0])
    engine, server = parse_settings(settings)
    server.read_api_keys()
    return len(settings), resolve(engine, backend="ray").served_model_name
