"""A `transformers` model with the interface of `models.decoder.Decoder`.

Shape letters: T tokens of the step, N positions whose logits are wanted, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rayllm.kv_layout import group_and_part, kv_groups
from rayllm.layers.batch import Batch
from rayllm.layers.kv_cache import LayerKV
from rayllm.models.fallback import attention
from rayllm.models.fallback.attention import ModelAttention
from rayllm.spec import DecoderSpec


class _Output:
    """What a causal model reads of its base model's output; whatever else it asks for is None."""

    def __init__(self, hidden_1ND: Tensor):
        self.last_hidden_state = hidden_1ND

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _GivenHidden(nn.Module):
    """Stands in the place of the base model: the rest of the causal model's forward is then its head, with whatever
    scaling and soft cap it has."""

    hidden_ND: Tensor

    @property
    def decoder(self) -> _GivenHidden:
        """Some causal models call the decoder of their base model themselves."""
        return self

    def forward(self, *arguments: Any, **others: Any) -> _Output:
        return _Output(self.hidden_ND.unsqueeze(0))


class TransformersDecoder:
    """One rank's share of a model. Use it under `torch.inference_mode()`."""

    def __init__(self, spec: DecoderSpec, causal_model: Any, calls: ModelAttention):
        """Takes the base model out of `causal_model`."""
        self.spec = spec
        self._attention = calls
        self._kv_group_of = [group for group, _ in group_and_part(kv_groups(spec))]
        self._base = getattr(causal_model, causal_model.base_model_prefix)
        self._given = _GivenHidden()
        setattr(causal_model, causal_model.base_model_prefix, self._given)
        self._head = causal_model

    def reference(self, token_ids_T: Tensor) -> Tensor:
        """`[T, V]` float32: the logits of one sequence, by the attention of `transformers` and the whole causal model
        as its class has it."""
        config, name = self._head.config, self._head.base_model_prefix
        ids_1T = token_ids_T.unsqueeze(0)
        positions_1T = torch.arange(len(token_ids_T), device=token_ids_T.device).unsqueeze(0)
        mask_1T = ids_1T.new_ones(ids_1T.shape)
        setattr(self._head, name, self._base)
        config._attn_implementation = "eager"
        try:
            output = self._head(input_ids=ids_1T, position_ids=positions_1T, attention_mask=mask_1T, use_cache=False)
        finally:
            config._attn_implementation = attention.NAME
            setattr(self._head, name, self._given)
        logits_TV: Tensor = output.logits[0]
        return logits_TV.float()

    def forward(self, batch: Batch, kv: list[LayerKV], metadata: list[Any]) -> Tensor:
        """As `Decoder.forward`: hidden states before the head, `[N, D]`, for `batch.logits_indices_N` only."""
        ids_1T = batch.token_ids_T.unsqueeze(0)
        self._attention.begin(kv, [metadata[group] for group in self._kv_group_of])
        output = self._base(
            input_ids=ids_1T,
            position_ids=batch.positions_T.unsqueeze(0),
            attention_mask=ids_1T.new_ones(ids_1T.shape),  # without it, transformers looks for packed sequences
            use_cache=False,
        )
        self._attention.end()
        return output[0][0][batch.logits_indices_N]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """`[N, V]` float32, the same bits on every rank."""
        self._given.hidden_ND = hidden_ND
        ids_1N = torch.zeros(1, len(hidden_ND), dtype=torch.int64, device=hidden_ND.device)
        logits_NV: Tensor = self._head(input_ids=ids_1N, use_cache=False).logits[0]
        return logits_NV.float()
