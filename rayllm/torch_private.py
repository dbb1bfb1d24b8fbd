"""The private names of torch that RayLLM uses, read in torch 2.11 to 2.13; no other module names any
(tests/test_private_names.py). torch has no public name for either."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

# ----------------------------------------------------------------------------------------------- oneDNN's products


def has_packed_products() -> bool:
    """Whether this torch has products with weights that are reordered for oneDNN."""
    ops = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(ops, "_reorder_linear_weight")
        and hasattr(ops, "_linear_pointwise")
    )


def has_native_products(dtype: torch.dtype) -> bool | None:
    """Whether oneDNN multiplies 16-bit floats of that type with this CPU's own instructions; None where torch cannot
    say."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return None if supported is None else bool(supported())


def packed_weight(weight_OI: Tensor) -> Tensor:
    """The weight, reordered; of use for `packed_product` and `packed_product_with` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI)


def packed_product(x_TI: Tensor, weight: Tensor, bias_O: Tensor | None, activation: str = "none") -> Tensor:
    """The product, with oneDNN's `activation` (none, relu, swish) applied to it."""
    return torch.ops.mkldnn._linear_pointwise(x_TI, weight, bias_O, activation, [], "")


def packed_product_with(x_TI: Tensor, other_TO: Tensor, weight: Tensor, bias_O: Tensor | None, operator: str) -> Tensor:
    """The product, multiplied with `other_TO` (operator "mul") or added to it ("add")."""
    return torch.ops.mkldnn._linear_pointwise.binary(x_TI, other_TO, weight, bias_O, operator)


# ------------------------------------------------------------------------------------------------------ collectives


def abort_collectives() -> None:
    """Makes a collective that another thread of this process waits in fail."""
    import torch.distributed.distributed_c10d as c10d

    with contextlib.suppress(Exception):  # there may be no group
        c10d._abort_process_group()


def forget_group_count() -> None:
    """Resets torch's count of groups, under which peers find each other. A group that failed to form is counted too."""
    import torch.distributed.distributed_c10d as c10d

    c10d._world.group_count = 0
