"""Stand-ins for what vLLM's test files import from vLLM.

A test of the server needs little of it: a tokenizer, a vocabulary's size, a version. Whatever else is imported is
`Absent`: the test that uses it is one of vLLM's own classes, not of a server, and is skipped with that reason.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

from vllm_tests import servers

ABSENT = "a test of vLLM's own code, not of a server: it uses"


class Absent:
    """A name of vLLM's that has no stand-in. It may be imported and passed on, not used."""

    def __init__(self, name: str):
        self._name = name

    def _skip(self, *args: Any, **kwargs: Any) -> NoReturn:
        pytest.skip(f"{ABSENT} {self._name}", allow_module_level=True)

    __call__ = __getitem__ = __iter__ = __instancecheck__ = __add__ = _skip

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._skip()

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (object,)

    def __repr__(self) -> str:
        return self._name


class _ModelConfig:
    """Of the model that is served in the place of any other."""

    def __init__(self, **given: Any):
        pass

    def get_vocab_size(self) -> int:
        return len(get_tokenizer())


class _Hub:
    def snapshot_download(self, *args: Any, **kwargs: Any) -> str:
        return "/no-hub-in-reach"


def get_tokenizer(*args: Any, **kwargs: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(servers.checkpoint()))


def _version() -> str:
    import rayllm

    return rayllm.__version__


_STAND_INS: dict[str, dict[str, Any]] = {
    "tests.utils": {
        "RemoteOpenAIServer": servers.RemoteOpenAIServer,
        "RemoteVLLMServer": servers.RemoteOpenAIServer,
        "ROCM_EXTRA_ARGS": [],
        "ROCM_ENV_OVERRIDES": {},
    },
    "vllm.tokenizers": {"get_tokenizer": get_tokenizer},
    "vllm.config": {"ModelConfig": _ModelConfig},
    "vllm.transformers_utils.repo_utils": {"hf_api": _Hub},
    "vllm.envs": {"VLLM_USE_RUST_FRONTEND": False},
    "vllm.platforms": {"current_platform": type("Platform", (), {"is_rocm": lambda self: False})()},
}


_TEST_MODULES = ("tests.utils", "tests.conftest")
"""What vLLM's tests share with its other tests."""


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self.__name__ == "vllm.version" and name == "__version__":
            return _version()
        full = f"{self.__name__}.{name}"
        if full in _STAND_INS or full == "vllm.version":
            return sys.modules.get(full) or importlib.import_module(full)
        return type(name, (Exception,), {}) if name.endswith("Error") else Absent(full)


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes every module of vLLM's, and its tests' own helpers, empty but for the stand-ins."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name == "vllm" or name.startswith("vllm.") or name in _TEST_MODULES:
            return importlib.machinery.ModuleSpec(name, self, is_package=name not in _TEST_MODULES)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(_STAND_INS.get(module.__name__, {}))
        if module.__name__ == "vllm.version":
            module.__dict__["__version__"] = _version()
        module.__file__ = str(Path(__file__))


def install() -> None:
    sys.meta_path.insert(0, StubFinder())
