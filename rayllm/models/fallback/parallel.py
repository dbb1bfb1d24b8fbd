"""What replaces linear layers and embeddings of a `transformers` model, by the word that its tensor-parallel plan has
for them. Shape letters: I inputs, O outputs, V vocabulary, D hidden width; `...` any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rayllm.distributed.groups import TensorParallel
from rayllm.layers.embedding import vocab_part
from rayllm.linear import Linear, dense_linear
from rayllm.weights.source import Outputs, WeightSource

GATHERED = ("colwise_gather_output", "colwise_rep")
SPLIT_INPUT = ("rowwise_split_input", "rowwise_rep")
LINEAR_WORDS = ("colwise", "rowwise", "packed_colwise", "packed_rowwise", *GATHERED, *SPLIT_INPUT)
REPLICATED = ("", "replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj", "local_params")
"""Words that change nothing in a forward pass: every rank holds and computes the whole. (`mla_kv_a_proj` differs in
gradients; `local_params` stands at the owner of parameters that have words of their own.)"""
SUMMED = ("moe_tp_experts", "all_reduce")
"""Modules whose outputs are this rank's part of a sum."""
KNOWN_WORDS = (*LINEAR_WORDS, *REPLICATED, *SUMMED, "embedding_rowwise")


class ParallelLinear(nn.Module):
    """A linear layer in place of `nn.Linear`, whose weight a rank holds in part."""

    def __init__(
        self, linear: Linear, num_inputs: int, num_outputs: int, word: str, tp: TensorParallel, dtype: torch.dtype
    ):
        super().__init__()
        self.in_features, self.out_features = num_inputs, num_outputs
        self.weight = torch.empty(num_outputs, num_inputs, dtype=dtype, device="meta")
        """For what a model asks of it: shape and dtype."""
        self.tp = tp
        self._linear = linear
        self._gathers = word in GATHERED
        self._sums = word in ("rowwise", "packed_rowwise", *SPLIT_INPUT)
        self._inputs = tp.shard(num_inputs, "inputs") if word in SPLIT_INPUT else None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., I]` -> `[..., O]`, of a rank's outputs where the word says so."""
        if self._inputs is not None:
            x = x[..., self._inputs.start : self._inputs.stop].contiguous()
        out = self._linear(x.reshape(-1, x.shape[-1]))
        if self._sums:
            out = self.tp.all_reduce(out)
        if self._gathers:
            out = self.tp.all_gather_last(out)[:, : self.out_features]
        return out.view(*x.shape[:-1], out.shape[-1])


class SplitEmbedding(nn.Module):
    """An embedding whose rows are split over ranks: each looks up the ids that are its own, and the rows are summed."""

    def __init__(self, inner: nn.Embedding, part: range, tp: TensorParallel):
        """`inner` holds the rows of `part`; a subclass may scale what it looks up."""
        super().__init__()
        self.inner = inner
        self.inner.padding_idx = None
        self.tp = tp
        self._part = part

    def forward(self, token_ids: Tensor) -> Tensor:
        """`[...]` -> `[..., D]`."""
        local = token_ids - self._part.start
        mine = (local >= 0) & (local < len(self._part))
        rows = self.inner(torch.where(mine, local, 0))
        return self.tp.all_reduce(rows * mine.unsqueeze(-1))


def make_linear(
    weights: WeightSource, name: str, module: nn.Linear, word: str, tp: TensorParallel, tied: Tensor | None = None
) -> ParallelLinear:
    """`module`, named `name`, as a rank's part with weights from `weights`; `tied` is its weight where it is another
    module's too. `ValueError` where it cannot be split evenly."""
    inputs, outputs, bias = module.in_features, module.out_features, module.bias is not None
    if tp.size == 1 or word in REPLICATED:
        word = ""
    if tied is not None:
        part = vocab_part(outputs, tp) if word in GATHERED else None
        linear = dense_linear(tied, weights.tensor(f"{name}.bias", (outputs,), part=part) if bias else None)
    elif word in GATHERED:
        linear = weights.linear([Outputs(name, outputs, vocab_part(outputs, tp))], inputs, bias=bias)
    elif word == "colwise":
        linear = weights.linear([Outputs(name, outputs, tp.shard(outputs, f"outputs of {name}"))], inputs, bias=bias)
    elif word == "packed_colwise":
        linear = weights.linear([Outputs(name, outputs, part) for part in halves(outputs, name, tp)], inputs, bias=bias)
    elif word == "packed_rowwise":
        parts = [
            weights.tensor(f"{name}.weight", (outputs, inputs), dim=1, part=part) for part in halves(inputs, name, tp)
        ]
        linear = dense_linear(torch.cat(parts, dim=1), _first_bias(weights, name, outputs, tp) if bias else None)
    elif word in ("rowwise", *SPLIT_INPUT):
        part = tp.shard(inputs, f"inputs of {name}")
        linear = weights.linear(
            [Outputs(name, outputs)], inputs, inputs=part, bias=bias, holds_bias=tp.rank == 0
        )  # the bias enters the ranks' sum once
    else:
        linear = weights.linear([Outputs(name, outputs)], inputs, bias=bias)
    return ParallelLinear(linear, inputs, outputs, word, tp, module.weight.dtype)


def halves(size: int, name: str, tp: TensorParallel) -> Iterator[range]:
    """A rank's parts of `size` things that are two kinds, one after the other."""
    part = tp.shard(size // 2, f"half of {name}")
    yield part
    yield range(part.start + size // 2, part.stop + size // 2)


def read_parameter(
    weights: WeightSource, name: str, shape: tuple[int, ...], word: str, tp: TensorParallel, dtype: torch.dtype
) -> Tensor:
    """A bare parameter (of stacked experts, say), cut as its word says. `ValueError` for words that mean nothing for
    its shape, or where it cannot be split evenly."""
    if tp.size == 1 or word in REPLICATED:
        return weights.tensor(name, shape, dtype=dtype)
    dims = {("colwise", 3): 1, ("rowwise", 3): 2, ("colwise", 1): 0, ("packed_colwise", 3): 1, ("packed_rowwise", 3): 2}
    dim = dims.get((word, len(shape)))
    if dim is None:
        raise ValueError(f"{word!r} of parameter {name} with shape {list(shape)} is not supported")
    whole = (
        [tp.shard(shape[dim], f"dimension {dim} of {name}")] if "packed" not in word else halves(shape[dim], name, tp)
    )
    parts = [weights.tensor(name, shape, dim=dim, part=part, dtype=dtype) for part in whole]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


class SummedOutput:
    """A forward hook: the ranks' outputs are summed."""

    def __init__(self, tp: TensorParallel):
        self.tp = tp

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.tp.all_reduce(output[0].contiguous()), *output[1:])
        return self.tp.all_reduce(output.contiguous())


def _first_bias(weights: WeightSource, name: str, num_outputs: int, tp: TensorParallel) -> Tensor | None:
    if tp.rank == 0:
        return weights.tensor(f"{name}.bias", (num_outputs,))
    weights.leave_to_others(f"{name}.bias", (num_outputs,))
    return None
