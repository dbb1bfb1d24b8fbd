"""Which backend computes a model. There is no GPU: where one is asked for, it is the interpreter's CPU, and times are
made up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import attention_libraries
import pytest
import torch
from attention_libraries import BatchPrefillWithPagedKVCacheWrapper, flash_attn_with_kvcache

from rayllm.config.engine import AttentionBackendName
from rayllm.errors import ConfigError
from rayllm.layers.attention import AttentionBackend, AttentionGroup, AttentionNeeds, choice, choose_backend
from rayllm.spec import GroupedAttentionSpec
from rayllm_kernels.device import interpreted

CPU = torch.device("cpu")
SPEC = GroupedAttentionSpec(8, 2, 64, 0.1)
GROUPS = [[AttentionGroup(2, 64)]]
NEEDS = AttentionNeeds((SPEC,), 1, 64, torch.bfloat16, CPU)


class _Gpu(AttentionNeeds):
    """The device is a CPU that passes for an H100."""

    def capability(self) -> tuple[int, int]:
        return 9, 0


GPU = _Gpu((SPEC,), 1, 64, torch.bfloat16, CPU)


def _on_gpu(groups: list[list[AttentionGroup]] = GROUPS, needs: AttentionNeeds = GPU, wanted: str = "auto") -> str:
    with interpreted():
        return choose_backend(groups, needs, wanted).name


def test_a_cpu_gathers_and_has_nothing_else() -> None:
    assert choose_backend(GROUPS, NEEDS).name == "gathered"
    assert choose_backend(GROUPS, NEEDS, "gathered").name == "gathered"
    with pytest.raises(ConfigError, match="attention_backend='triton' cannot be used: it needs a GPU, and a cpu has o"):
        choose_backend(GROUPS, NEEDS, "triton")


def test_a_gpu_has_our_kernels_unless_they_do_not_take_the_model() -> None:
    assert _on_gpu() == _on_gpu(wanted="triton") == "triton"
    assert _on_gpu(wanted="gathered") == "gathered"
    assert _on_gpu([[AttentionGroup(2, 288)]]) == "gathered"
    assert _on_gpu([[AttentionGroup(1, 576, shares_cache=True)]]) == "triton"
    with pytest.raises(ConfigError, match="'triton' cannot be used: block_size=8 is not a multiple of 16"):
        _on_gpu(needs=replace(GPU, block_size=8), wanted="triton")


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("flash-attn", r"FlashAttention 3 is not installed \(no module flash_attn_interface\)"),
        ("flashinfer", r"FlashInfer is not installed \(no module flashinfer\)"),
    ],
)
def test_asking_for_a_library_that_is_missing_is_an_error(wanted: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"attention_backend='{wanted}' cannot be used: {reason}; give auto or ano"):
        _on_gpu(wanted=wanted)


@pytest.fixture
def _libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are installed, and the device counts as a GPU."""
    members = {"flash_attn_with_kvcache": flash_attn_with_kvcache}
    attention_libraries.install(monkeypatch, "flash_attn_interface", **members)
    wrapper = BatchPrefillWithPagedKVCacheWrapper
    attention_libraries.install(monkeypatch, "flashinfer", BatchPrefillWithPagedKVCacheWrapper=wrapper)
    monkeypatch.setattr(choice, "_GPU_TYPES", ("cpu",))
    monkeypatch.setattr(choice, "_PROMPT_TOKENS", 64)


def _took(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float | Exception]) -> None:
    """What a measurement finds, after it has run what it measures."""
    order = iter(seconds.values())

    def per_run(run: Callable[[], object]) -> float:
        run()
        found = next(order)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(choice, "_seconds_per_run", per_run)


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"triton": 0.002, "flash-attn": 0.001, "flashinfer": 0.003}, "flash-attn"),
        ({"triton": 0.002, "flash-attn": 0.004, "flashinfer": 0.0015}, "flashinfer"),
        ({"triton": 0.002, "flash-attn": 0.002, "flashinfer": 0.0025}, "triton"),
        ({"triton": 0.002, "flash-attn": RuntimeError("no kernel image"), "flashinfer": 0.003}, "triton"),
    ],
)
def test_the_fastest_is_chosen_by_measuring_all_and_the_log_says_so(
    seconds: dict[str, float | Exception],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _took(monkeypatch, seconds)
    with caplog.at_level(logging.INFO):
        assert _on_gpu() == expected
    times = [f"{name} {1000 * each:.3f} ms" for name, each in seconds.items() if isinstance(each, float)]
    assert f"a layer's attention to 2 prompts of 64 tokens: {', '.join(times)}" in caplog.text
    assert ("'flash-attn' fails and is not used: no kernel image" in caplog.text) == (len(times) < 3)


@pytest.mark.usefixtures("_libraries")
def test_a_library_that_is_asked_for_is_not_measured() -> None:
    assert _on_gpu(wanted="flashinfer") == "flashinfer"
    assert _on_gpu(wanted="flash-attn") == "flash-attn"


@pytest.mark.usefixtures("_libraries")
def test_a_library_that_does_not_load_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attention_libraries.install(monkeypatch, "flash_attn_interface")
    _took(monkeypatch, {"triton": 0.002, "flashinfer": 0.001})
    assert _on_gpu() == "flashinfer"
    assert "'flash-attn' is installed but cannot be used: module 'flash_attn_interface' has no" in caplog.text


def test_every_backend_is_one_that_the_settings_know() -> None:
    classes: list[type[AttentionBackend]] = [choice.GatheredBackend, choice.TritonBackend, *choice._LIBRARIES]
    assert {*get_args(AttentionBackendName)} == {"auto", *(each.name for each in classes)}
