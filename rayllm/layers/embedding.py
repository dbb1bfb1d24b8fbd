"""Token embedding and output head, both split over the vocabulary; learned positions.

Shape letters: T tokens, D hidden width, V vocabulary, N positions whose logits are wanted.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rayllm.distributed.groups import TensorParallel
from rayllm.linear import Linear
from rayllm.weights.source import WeightSource
from rayllm_kernels.embedding import embed_part
from rayllm_kernels.logits import join_logits


def vocab_part(vocab_size: int, tp: TensorParallel) -> range:
    """This rank's token ids; the vocabulary is padded until it divides, so the last part may reach past its end."""
    width = -(-vocab_size // tp.size)
    return range(tp.rank * width, (tp.rank + 1) * width)


class VocabEmbedding:
    """A rank looks up the ids that are its own, and the ranks' rows are summed."""

    def __init__(self, weights: WeightSource, name: str, vocab_size: int, width: int, tp: TensorParallel):
        self._part = vocab_part(vocab_size, tp)
        self.weight_VD = weights.tensor(f"{name}.weight", (vocab_size, width), part=self._part)
        self._tp = tp

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        if self._tp.size == 1:
            return F.embedding(token_ids_T, self.weight_VD)
        return self._tp.all_reduce(embed_part(token_ids_T, self.weight_VD, self._part.start))


class OutputHead:
    """Logits over the whole vocabulary, float32, the same bits on every rank."""

    def __init__(
        self,
        linear: Linear,
        vocab_size: int,
        tp: TensorParallel,
        scale: float = 1.0,
        soft_cap: float | None = None,
    ):
        """Logits are multiplied by `scale`, then become c * tanh(logit / c) where there is a `soft_cap` c."""
        self._linear = linear
        self._vocab_size = vocab_size
        self._tp = tp
        self._scale = scale
        self._soft_cap = soft_cap

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        parts_PNV = self._tp.all_gather(self._linear(hidden_ND))
        return join_logits(parts_PNV, self._vocab_size, self._scale, self._soft_cap)


class LearnedPositions:
    """A vector for each position, on every rank."""

    def __init__(self, weights: WeightSource, name: str, num_positions: int, offset: int, width: int):
        self._weight = weights.tensor(f"{name}.weight", (num_positions + offset, width))
        self._offset = offset

    def __call__(self, positions_T: Tensor) -> Tensor:
        return F.embedding(positions_T + self._offset, self._weight)
