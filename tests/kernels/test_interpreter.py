"""What `triton_interpreter` corrects, and what the other tools of these tests find."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter
from kernel_accuracy import Buffers, random_tensor, relative_error
from triton.runtime.errors import InterpreterError

NARROW = [torch.bfloat16, torch.float16]


@triton.jit
def _convert_kernel(x_ptr, out_ptr, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    at = row * SIZE + column
    out = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision=PRECISION)
    tl.store(out_ptr + at, out)


@triton.jit
def _compute_kernel(x_ptr, out_ptr, SIZE: tl.constexpr, OPERATION: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    if OPERATION == "add":
        tl.store(out_ptr + at, x + x)
    elif OPERATION == "negate":
        tl.store(out_ptr + at, -x)
    elif OPERATION == "sum":
        tl.store(out_ptr, tl.sum(x, axis=0))
    elif OPERATION == "select":
        tl.store(out_ptr + at, tl.where(at < 2, x, tl.zeros_like(x)))


def _convert(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    _convert_kernel[(triton.cdiv(x.numel(), 16),)](x, out, x.numel(), SIZE=16)
    return out


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
def test_conversions_round_to_nearest_even(source: torch.dtype, target: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-40, 6e-8, 65504.0, 1e38, 1 + 2**-8, 1 + 3 * 2**-8])
    x = torch.cat([random_tensor(300), special]).to(source)
    found, expected = _convert(x, target), x.to(target)
    assert torch.equal(found, expected)
    assert _convert(torch.tensor([math.nan], dtype=source), target).isnan().all()


@pytest.mark.parametrize("source", [torch.int32, torch.int64])
def test_integers_become_bfloat16_by_their_values(source: torch.dtype) -> None:
    x = torch.tensor([0, 1, -3, 257, 100000], dtype=source)
    assert torch.equal(_convert(x, torch.bfloat16), x.to(torch.bfloat16))
    assert _convert(torch.tensor([2.75, -2.75], dtype=torch.bfloat16), source).tolist() == [2, -2]


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_saturates(source: torch.dtype, target: torch.dtype) -> None:
    limit = torch.finfo(target).max
    x = torch.cat([3 * random_tensor(200), torch.tensor([0.0, 1e-9, 60000.0, -60000.0, math.inf, -math.inf])]).to(
        source
    )
    found = _convert(x, target)
    assert torch.equal(found.float(), x.float().clamp(-limit, limit).to(target).float())
    assert _convert(found, torch.float32).equal(found.float())
    assert _convert(torch.tensor([math.nan], dtype=source), target).float().isnan().all()


@pytest.mark.parametrize("dtype", [*NARROW, torch.float8_e4m3fn])
def test_products_of_narrow_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    a, b = (random_tensor(16, 16, seed=seed).to(dtype) for seed in (1, 2))
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out, SIZE=16, PRECISION="ieee")
    assert relative_error(out, a.double() @ b.double()) < 1e-6


def test_products_of_float32_must_ask_for_its_precision() -> None:
    a, b = random_tensor(16, 16, seed=1), random_tensor(16, 16, seed=2)
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out, SIZE=16, PRECISION="ieee")
    assert relative_error(out, a.double() @ b.double()) < 1e-6
    with pytest.raises(InterpreterError, match="pass input_precision='ieee'"):
        _dot_kernel[(1,)](a, b, out, SIZE=16, PRECISION="tf32")


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("operation", ["add", "negate", "sum"])
def test_arithmetic_in_a_narrow_type_is_refused(operation: str, dtype: torch.dtype) -> None:
    x = random_tensor(16, dtype=dtype)
    with pytest.raises(InterpreterError, match="convert to float32 after the load"):
        _compute_kernel[(1,)](x, x.clone(), SIZE=16, OPERATION=operation)


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_values_may_be_selected(dtype: torch.dtype) -> None:
    x = random_tensor(4, dtype=dtype)
    out = torch.empty_like(x)
    _compute_kernel[(1,)](x, out, SIZE=4, OPERATION="select")
    assert out.tolist() == [*x[:2].tolist(), 0, 0]


def test_what_is_in_another_version_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    with pytest.raises(RuntimeError, match="compare its"), triton_interpreter.corrected():
        pass


def test_the_interpreter_is_left_as_it_was() -> None:
    from triton.runtime import interpreter

    inside = interpreter._convert_float
    with triton_interpreter.corrected():
        assert interpreter._convert_float is inside
    assert interpreter._convert_float is inside


def test_memory_that_a_kernel_was_to_write_is_nan() -> None:
    assert torch.empty(5).isnan().all()
    assert torch.empty_like(torch.ones(5, dtype=torch.bfloat16)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8])
def test_canaries_find_what_is_written_outside(dtype: torch.dtype) -> None:
    for offset in (-1, 6):
        buffers = Buffers()
        out = buffers.output(2, 3, dtype=dtype)
        buffers.check()
        out.fill_(1)
        buffers.check()
        out.as_strided((1,), (1,), out.storage_offset() + offset).fill_(1)
        with pytest.raises(AssertionError, match="written"):
            buffers.check()


def test_inputs_must_stay_as_they_are() -> None:
    buffers = Buffers()
    x, y = buffers.input(torch.ones(2)), buffers.inout(torch.ones(2))
    y.add_(1)
    buffers.check()
    x.add_(1)
    with pytest.raises(AssertionError, match="an input"):
        buffers.check()
