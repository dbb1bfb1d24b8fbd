from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from fakes import fake_config
from torch import Tensor

from rayllm.errors import ConfigError, WorkerDiedError
from rayllm.runner import device_check
from rayllm.runner.device_check import check_capability, check_device

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_sound_device_passes_in_every_dtype(dtype: str) -> None:
    check_device(fake_config(dtype=dtype), 0, CPU)


def _one_wrong(a: Tensor, b: Tensor) -> Tensor:
    found = a @ b
    found[3, 5] += 1
    return found


def _not_a_number(a: Tensor, b: Tensor) -> Tensor:
    return torch.full((len(a), b.shape[1]), torch.nan)


def _lost(a: Tensor, b: Tensor) -> Tensor:
    raise RuntimeError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA")


@pytest.mark.parametrize(
    ("multiply", "expected"),
    [
        (_one_wrong, r"computed 1 of 4096 values incorrectly; the first, at \[3, 5\], is (\S+) instead of (\S+)$"),
        (_not_a_number, r"computed 4096 of 4096 values incorrectly; .*, is nan instead of"),
        (_lost, r"failed: CUDA error: unspecified launch failure Compile"),
    ],
)
def test_a_device_that_computed_wrongly_is_named_with_what_was_expected(
    multiply: Callable[[Tensor, Tensor], Tensor], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_check, "multiply", multiply)
    with pytest.raises(WorkerDiedError, match=r"^worker rank 3 failed: its device \(cpu\) " + expected) as caught:
        check_device(fake_config(), 3, CPU)
    assert "\n" not in str(caught.value)


def test_a_device_that_memory_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda tensor: clone(tensor) & ~8)  # a bit that is stuck
    with pytest.raises(WorkerDiedError, match=r"stored 8192 of 16384 values incorrectly; .* is 0 instead of 8$"):
        check_device(fake_config(), 0, CPU)


def test_a_gpu_that_others_fill_is_refused_before_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 2**30, 80 * 2**30))
    fault = device_check._memory_shortage(fake_config(), torch.device("cuda"))
    assert fault is not None
    assert fault.startswith("has 2.0 of 80.0 GiB free, so gpu_memory_utilization=0.92 leaves nothing for this engine")
    assert device_check._memory_shortage(fake_config(engine={"num_kv_blocks": 2}), torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("capability", "dtype", "is_refused"),
    [((7, 5), "bfloat16", True), ((8, 0), "bfloat16", False), ((7, 5), "float16", False)],
)
def test_a_dtype_that_a_gpu_has_no_instructions_for_is_refused_with_what_to_use(
    capability: tuple[int, int], dtype: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    refusal = pytest.raises(ConfigError) if is_refused else contextlib.nullcontext()
    with refusal as caught:
        check_capability(dtype, torch.device("cuda"))
    if is_refused:
        assert str(caught.value) == (
            "dtype='bfloat16' needs a GPU of compute capability 8.0, and Tesla T4 has 7.5: use --dtype half"
        )
    check_capability(dtype, CPU)
