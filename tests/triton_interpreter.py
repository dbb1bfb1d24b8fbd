"""Makes Triton's interpreter right for bfloat16 and float8, and strict about arithmetic in types below 32 bits.

As it is, the interpreter keeps bfloat16 and float8 as bit patterns: it adds and multiplies the patterns, truncates
where a GPU rounds to nearest even, and lets float8 overflow where a GPU saturates. It also multiplies float32 exactly
where a GPU takes TensorFloat-32 unless it is told not to. `corrected` replaces its conversions by torch's, widens what
`tl.dot` multiplies, and raises where a kernel does something else in a narrow type: kernels load, convert to float32,
compute, and convert on the store.

The names that it replaces are private: it checks that they exist, and `test_triton_interpreter.py` what they do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

KNOWN_VERSIONS = ((3, 6), (3, 9))
"""The first and the last version of Triton that this module was written for."""

_TORCH_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
_NARROW = {"fp16", "bf16", "fp8e4nv", "fp8e5", "fp8e4b8", "fp8e4b15", "fp8e5b16"}
_AS_BITS = _NARROW - {"fp16"}
"""The types whose values the interpreter holds as unsigned integers."""


class NarrowArithmeticError(TypeError):
    """A kernel computes in a type of less than 32 bits."""


@contextlib.contextmanager
def corrected() -> Iterator[None]:
    """While this lasts, kernels that run in the interpreter compute as on a GPU, and numpy does not warn of infinities
    and NaN: a GPU does not either. Raises RuntimeError for a version of Triton that it does not know."""
    _check_version()
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(interpreter, "_convert_float", _convert)
        builder = interpreter.InterpreterBuilder
        patch.setattr(builder, "cast_impl", _cast_with(builder.cast_impl))
        patch.setattr(builder, "create_dot", _dot)
        for name in ("binary_op", "unary_op", "create_fma", "create_erf", "create_rsqrt", "create_clampf"):
            patch.setattr(builder, name, _refusing(getattr(builder, name)))
        operations = interpreter.ReduceScanOpInterface
        patch.setattr(operations, "check_tensor", _refusing_reductions(operations.check_tensor))
        yield


def _check_version() -> None:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not KNOWN_VERSIONS[0] <= version <= KNOWN_VERSIONS[1]:
        raise RuntimeError(
            f"Triton {triton.__version__} is not one that triton_interpreter.py knows ({KNOWN_VERSIONS}): compare its "
            "runtime/interpreter.py with what is replaced here, then change KNOWN_VERSIONS"
        )


def _name(dtype: Any) -> str:
    return str(dtype.scalar)


def _values(data: np.ndarray, dtype: Any) -> torch.Tensor:
    """What a handle of `dtype` holds, as torch's type of the same name."""
    if _name(dtype) not in _TORCH_DTYPES:
        raise NotImplementedError(f"triton_interpreter.py does not know the values of {dtype}")
    return torch.from_numpy(np.array(data)).view(_TORCH_DTYPES[_name(dtype)])


def _convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """The bits of `data` in the type `target`, rounded to nearest even; float8 saturates, as on an NVIDIA GPU."""
    if rounding not in (None, interpreter._ir.ROUNDING_MODE.RTNE):
        raise NotImplementedError(f"triton_interpreter.py rounds to nearest even alone, not by {rounding}")
    values, dtype = _values(data, source), _TORCH_DTYPES.get(_name(target))
    if dtype is None:
        raise NotImplementedError(f"triton_interpreter.py does not know the values of {target}")
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        values = values.float().clamp(-limit, limit)  # leaves NaN
    bits = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[dtype.itemsize]
    return values.to(dtype).view(bits).numpy().reshape(data.shape)


def _cast_with(cast: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if _name(source.dtype) in _AS_BITS:
            wide = interpreter.TensorHandle(_values(source.data, source.dtype).float().numpy(), tl.float32)
            return wide if target.scalar == tl.float32 else self.cast_impl(wide, target)
        if _name(target) in _AS_BITS:
            data, dtype = source.data, source.dtype
            if not dtype.scalar.is_floating():
                data, dtype = data.astype(np.float32), tl.float32
            return interpreter.TensorHandle(_convert(data, dtype, target, None), target.scalar)
        return cast(self, source, target)

    return cast_impl


def _dot(self: Any, a: Any, b: Any, sums: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    precisions = interpreter._ir.INPUT_PRECISION
    if _name(a.dtype) == "fp32" and input_precision not in (precisions.IEEE, precisions.TF32x3):
        raise NarrowArithmeticError(
            f"tl.dot of float32 rounds its operands to {input_precision} on a GPU: pass input_precision='ieee'"
        )
    wide = [_values(x.data, x.dtype).float().numpy() if _name(x.dtype) in _NARROW else x.data for x in (a, b)]
    dtype = np.float32 if sums.data.dtype == np.float16 else sums.data.dtype
    product = np.matmul(*wide, dtype=dtype) + sums.data
    return interpreter.TensorHandle(product.astype(sums.data.dtype), sums.dtype.scalar)


def _refusing(operation: Callable[..., Any]) -> Callable[..., Any]:
    def refuse_narrow(self: Any, *args: Any) -> Any:
        for arg in args:
            if isinstance(arg, interpreter.TensorHandle) and _name(arg.dtype) in _NARROW:
                what = getattr(args[-1], "__name__", operation.__name__)
                raise NarrowArithmeticError(f"{what} in {_name(arg.dtype)}: convert to float32 after the load")
        return operation(self, *args)

    return refuse_narrow


def _refusing_reductions(check: Callable[..., Any]) -> Callable[..., Any]:
    def check_tensor(self: Any, inputs: Any) -> None:
        check(self, inputs)
        for tensor in inputs:
            if _name(tensor.dtype) in _NARROW:
                raise NarrowArithmeticError(
                    f"a reduction or scan in {_name(tensor.dtype)}: convert to float32 after the load"
                )

    return check_tensor
