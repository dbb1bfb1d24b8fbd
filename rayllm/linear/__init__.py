"""Linear layers by how their weight is stored and multiplied; `dense_linear` chooses for a plain weight."""

from rayllm.linear.base import Linear
from rayllm.linear.dense import DenseLinear
from rayllm.linear.experts import ExpertLinear, SeparateExperts, StackedExperts, expert_gated_linear, expert_linear
from rayllm.linear.gated import GatedLinear, JoinedGatedLinear, SeparateGatedLinear, gated_linear
from rayllm.linear.packed import PackedLinear
from rayllm.linear.per_head import PerHeadLinear
from rayllm.linear.select import dense_linear
from rayllm.linear.widened import WidenedLinear

__all__ = [
    "DenseLinear",
    "ExpertLinear",
    "GatedLinear",
    "JoinedGatedLinear",
    "Linear",
    "PackedLinear",
    "PerHeadLinear",
    "SeparateExperts",
    "SeparateGatedLinear",
    "StackedExperts",
    "WidenedLinear",
    "dense_linear",
    "expert_gated_linear",
    "expert_linear",
    "gated_linear",
]
