"""Linear layers by how their weight is stored and multiplied; `dense_linear` chooses for a plain weight."""

from rayllm.linear.base import Linear
from rayllm.linear.dense import DenseLinear
from rayllm.linear.gated import GatedLinear, JoinedGatedLinear, SeparateGatedLinear, gated_linear
from rayllm.linear.packed import PackedLinear
from rayllm.linear.select import dense_linear
from rayllm.linear.widened import WidenedLinear

__all__ = [
    "DenseLinear",
    "GatedLinear",
    "JoinedGatedLinear",
    "Linear",
    "PackedLinear",
    "SeparateGatedLinear",
    "WidenedLinear",
    "dense_linear",
    "gated_linear",
]
