"""vLLM's source package: fetched by pip, unpacked into a cache folder, read by pytest alone.

Nothing of it is imported by RayLLM or kept in its repository.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

VERSION = "0.33.0"
"""Of the tests that `applicability` speaks of."""
BUILD_PACKAGES = ("setuptools", "setuptools-rust", "setuptools-scm", "wheel", "packaging", "jinja2", "cmake", "ninja")
"""What pip needs to read the package's metadata."""
TEST_PACKAGES = ("openai", "anthropic", "regex", "requests", "jsonschema", "httpx", "pybase64", "prometheus-client")
"""What its tests import beside what RayLLM's own tests need."""
_HERE = Path(__file__).resolve().parent
_ENTRYPOINTS = Path("tests/entrypoints")
FILES = (
    "anthropic/test_messages.py",
    "openai/chat_completion/test_chat.py",
    "openai/chat_completion/test_chat_completion.py",
    "openai/chat_completion/test_chat_echo.py",
    "openai/chat_completion/test_chat_logit_bias_validation.py",
    "openai/chat_completion/test_completion_with_function_calling.py",
    "openai/chat_completion/test_enable_force_include_usage.py",
    "openai/chat_completion/test_include_reasoning.py",
    "openai/chat_completion/test_logprob_token_ids.py",
    "openai/chat_completion/test_root_path.py",
    "openai/completion/test_completion.py",
    "openai/completion/test_prompt_validation.py",
    "openai/completion/test_token_in_token_out.py",
    "openai/models/test_models.py",
    "openai/responses/test_basic.py",
    "openai/responses/test_errors.py",
    "openai/responses/test_function_call.py",
    "openai/responses/test_simple.py",
    "openai/responses/test_stateful.py",
    "openai/responses/test_structured_output.py",
    "openai/test_chunked_prompt.py",
    "openai/test_return_token_ids.py",
    "openai/test_return_tokens_as_ids.py",
    "serve/instrumentator/test_basic.py",
    "serve/instrumentator/test_metrics.py",
    "serve/instrumentator/test_orca_metrics.py",
    "serve/instrumentator/test_uds.py",
    "serve/tokenize/test_serving_tokenization.py",
    "serve/tokenize/test_tokenization.py",
)
"""Those that talk to a server which generates text."""


def source_folder(environment: Path) -> Path:
    """The unpacked source package, fetched where it is not there yet. `environment` has `BUILD_PACKAGES`.

    pip reads a package's metadata before it hands the package over, for which vLLM's build script imports torch: it
    finds the one that RayLLM uses.
    """
    folder = environment / f"vllm-{VERSION}"
    if (folder / "unpacked").exists():
        return folder
    variables = {**os.environ, "VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": VERSION}
    variables["PYTHONPATH"] = os.pathsep.join(_own_site_packages())
    pip = [str(environment / "bin" / "python"), "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    pip += ["--no-deps", "--no-build-isolation", "--no-binary", "vllm", "--dest", str(environment), f"vllm=={VERSION}"]
    done = subprocess.run(pip, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(pip)} failed:\n{done.stdout}{done.stderr}")
    with tarfile.open(environment / f"vllm-{VERSION}.tar.gz") as archive:
        archive.extractall(environment, filter="data")
    (folder / "unpacked").touch()
    return folder


def _own_site_packages() -> list[str]:
    import torch

    return list(dict.fromkeys([sysconfig.get_path("purelib"), str(Path(torch.__file__).parents[1])]))


def command(environment: Path) -> tuple[list[str], dict[str, str]]:
    """pytest's command line, in this Python, and the environment variables that it needs more."""
    folder = source_folder(environment)
    found = [sys.executable, "-m", "pytest", "-q", "-rsx", "--tb=short", "-p", "no:cacheprovider", "-c", os.devnull]
    found += ["--noconftest", "--rootdir", str(folder), "-W", "ignore", "-o", "asyncio_mode=strict", "-n", "0"]
    found += ["-o", "asyncio_default_fixture_loop_scope=function"]
    for plugin in ("vllm_tests.plugin", "tests.entrypoints.conftest", "tests.entrypoints.openai.responses.conftest"):
        found += ["-p", plugin]
    found += [str(folder / _ENTRYPOINTS / name) for name in FILES]
    [packages] = (environment / "lib").glob("python*/site-packages")
    paths = [str(_HERE.parent), str(_HERE.parents[1]), str(folder)]
    return found, {
        "PYTHONPATH": os.pathsep.join(paths),
        "CONFORMANCE_PACKAGES": str(packages),
        "CONFORMANCE_CORPUS": str(folder / _ENTRYPOINTS / "openai"),
    }
