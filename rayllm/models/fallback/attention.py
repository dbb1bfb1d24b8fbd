"""What the classes of `transformers` call in place of their own attention and masks.

`transformers` finds both by a name in its registries (`AttentionInterface`, `AttentionMaskInterface`). The mask of a
layer is no tensor here: it is a `CausalMask`, checked against the functions that `transformers` would make the tensor
of, so that a layer that masks in another way is refused, not served without its mask.

Shape letters: T tokens of the step, H query heads, K key/value heads of this rank, D width of keys, V width of values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayllm.distributed.groups import TensorParallel
from rayllm.errors import ConfigError
from rayllm.layers.attention import AttentionBackend, AttentionGroup, LayerAttention, kv_heads_of
from rayllm.layers.kv_cache import LayerKV
from rayllm.spec import GroupedAttentionSpec

NAME = "rayllm_paged"
_STATE = "_rayllm_attention"
_KNOWN_ARGUMENTS = frozenset(
    {"dropout", "position_ids", "position_embeddings", "use_cache", "cache_position", "logits_to_keep", "is_causal"}
    | {"output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "training", "layer_idx"}
)
"""Arguments that pass through a model to its attention and change nothing there, in a step without gradients."""


@dataclass(frozen=True, slots=True)
class CausalMask:
    """Stands for the mask of a layer."""

    window: int | None


@dataclass(frozen=True, slots=True)
class OtherMask:
    """Stands for a mask that is neither causal nor causal within a window; some models make one that no layer uses."""

    name: str


class ModelAttention:
    """The attention of all layers of one model. `begin` a forward pass, then each layer calls `attend` once, then
    `end`."""

    def __init__(
        self,
        what: str,
        specs: Sequence[GroupedAttentionSpec],
        groups: Sequence[AttentionGroup],
        tp: TensorParallel,
        backend: AttentionBackend,
    ):
        """`what` names the model in errors; `groups` are the layers' own."""
        self._what = what
        self._specs = specs
        self._groups = groups
        self.tp = tp
        self.gathers_heads = False
        """Whether a layer has its queries, keys and values whole, and this rank attends with its own of them."""
        self._backend = backend
        self._layers: list[LayerAttention | None] = [None] * len(specs)
        self._called: list[bool] = []
        self._kv: Sequence[LayerKV] = ()
        self._metadata: Sequence[Any] = ()

    def bind(self, model: nn.Module) -> None:
        """Makes every module of the model find this object."""
        for module in model.modules():
            module.__dict__[_STATE] = self

    def begin(self, kv: Sequence[LayerKV], metadata: Sequence[Any]) -> None:
        """`kv` and `metadata`: of each layer."""
        self._kv, self._metadata = kv, metadata
        self._called = [False] * len(self._specs)

    def end(self) -> None:
        """`ConfigError` where not every layer called: its attention was computed elsewhere, without earlier tokens."""
        if not all(self._called):
            raise self.fault(
                f"{self._called.count(False)} of its {len(self._called)} layers compute attention by themselves, not "
                "through AttentionInterface"
            )

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, soft_cap: float | None, s_aux: Any
    ) -> Tensor:
        """`q` `[1, H, T, D]`, `k` `[1, K, T, D]`, `v` `[1, K, T, V]`; returns `[1, T, H, V]`."""
        index = self._index(module)
        q_THD, k_TKD, v_TKV = (x[0].transpose(0, 1) for x in (q, k, v))
        whole = q_THD.shape[1] == self._specs[index].num_heads and self.tp.size > 1
        self.gathers_heads |= whole
        if whole:  # its plan gathers queries, keys and values: a rank attends with its own heads
            q_THD, k_TKD, v_TKV = self._own(q_THD), self._own_kv(k_TKD), self._own_kv(v_TKV)
        width = v_TKV.shape[-1]
        if width < k_TKD.shape[-1]:
            v_TKV = F.pad(v_TKV, (0, k_TKD.shape[-1] - width))
        layer = self._layers[index]
        if layer is None:
            self._check_shapes(index, q_THD, k_TKD, v_TKV)
            sinks = None if s_aux is None else self._sinks(s_aux, q_THD.shape[1])
            layer = self._layers[index] = LayerAttention(self._groups[index], scale, soft_cap, sinks)
        elif (layer.scale, layer.soft_cap) != (scale, soft_cap):
            raise self.fault(f"layer {index} changes the scale or the soft cap of its scores from call to call")
        kv, metadata = self._kv[index], self._metadata[index]
        self._backend.write(k_TKD, v_TKV, kv, metadata, layer)
        out_THV = self._backend.forward(q_THD, k_TKD, v_TKV, kv, metadata, layer)[..., :width]
        if whole:
            out_THV = self.tp.all_gather_last(out_THV.flatten(1)).view(len(out_THV), -1, width)
        return out_THV.unsqueeze(0)

    def check_mask(self, module: nn.Module, mask: Any, window: int | None) -> None:
        """`ConfigError` where a layer's mask, or the `window` that it passes, is not what was planned with."""
        index, planned = self._index(module), self._specs[self._index(module)].window
        if not isinstance(mask, CausalMask):
            made = "no mask" if mask is None else "a mask that the model computes itself"
            if isinstance(mask, OtherMask):
                made = f"a mask ({mask.name}) that is neither causal nor causal within a window"
            raise self.fault(f"layer {index} attends with {made}")
        if mask.window != planned:
            raise self.fault(f"layer {index} has window {mask.window}, but its config.json means {planned}")
        if window is not None and window != planned:
            raise self.fault(f"layer {index} passes sliding_window={window} and masks with window {planned}")

    def called(self, module: nn.Module) -> None:
        """Counts a layer's call."""
        index = self._index(module)
        if self._called[index]:
            raise self.fault(f"layer {index} attends more than once in a forward pass")
        self._called[index] = True

    def fault(self, why: str) -> ConfigError:
        return ConfigError(
            f"{self._what} cannot be served through transformers: {why}. Run it with transformers itself, or serve a "
            "model of another architecture"
        )

    def _index(self, module: nn.Module) -> int:
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not 0 <= index < len(self._specs):
            raise self.fault(f"{type(module).__name__}.layer_idx={index!r} is not the number of a layer")
        return index

    def _own(self, x_THD: Tensor) -> Tensor:
        heads = self.tp.shard(x_THD.shape[1], "num_attention_heads")
        return x_THD[:, heads.start : heads.stop]

    def _own_kv(self, x_TKD: Tensor) -> Tensor:
        heads = kv_heads_of(x_TKD.shape[1], self.tp.rank, self.tp.size)
        return x_TKD[:, heads.start : heads.stop]

    def _sinks(self, sinks_H: Tensor, num_heads: int) -> Tensor:
        flat_H = sinks_H.detach().float().flatten()
        if len(flat_H) != num_heads:
            own = self.tp.shard(len(flat_H), "sinks")
            flat_H = flat_H[own.start : own.stop]
        return flat_H

    def _check_shapes(self, index: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        spec, size = self._specs[index], self.tp.size
        planned = (spec.num_heads // size, max(1, spec.num_kv_heads // size), spec.head_dim, spec.head_dim)
        found = (q_THD.shape[1], k_TKD.shape[1], k_TKD.shape[2], v_TKD.shape[2])
        if found != planned:
            raise self.fault(
                f"layer {index} attends with {found[0]} heads, {found[1]} key/value heads and widths {found[2]} and "
                f"{found[3]}, but its config.json means {planned[0]}, {planned[1]}, {planned[2]} and {planned[3]}"
            )


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What `AttentionInterface` calls: `[1, heads, T, width]` each, the output is `[1, T, heads, width]`.

    Raises `ConfigError` for arguments that would change the result and are not known.
    """
    attention: ModelAttention = module.__dict__[_STATE]
    unknown = sorted(name for name, given in others.items() if given is not None and name not in _KNOWN_ARGUMENTS)
    if unknown or others.get("is_causal") is False or others.get("dropout"):
        given = ", ".join(unknown) or ("is_causal=False" if others.get("is_causal") is False else "dropout")
        raise attention.fault(f"{type(module).__name__} passes {given} to its attention")
    attention.check_mask(module, attention_mask, sliding_window)
    attention.called(module)
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    return attention.attend(module, query, key, value, scale, softcap, s_aux), None


def causal_mask(mask_function: Callable[..., Any], config: Any = None, local_size: int | None = None, **_: Any) -> Any:
    """What `AttentionMaskInterface` calls: a `CausalMask`, or an `OtherMask`."""
    from transformers.masking_utils import causal_mask_function

    if mask_function is causal_mask_function:
        return CausalMask(None)
    window = local_size if local_size is not None else getattr(config, "sliding_window", None)
    if isinstance(window, int) and window > 0 and _is_window(mask_function, window):
        return CausalMask(window)
    return OtherMask(getattr(mask_function, "__qualname__", repr(mask_function)).split(".")[0])


def _is_window(mask_function: Callable[..., Any], window: int) -> bool:
    """Whether it allows exactly the `window` last tokens, tried at the places where masks differ."""
    edges = sorted({0, 1, window - 1, window, window + 1, 2 * window - 1, 2 * window, 2 * window + 1})
    q, k = torch.tensor(edges).unsqueeze(1), torch.tensor(edges).unsqueeze(0)
    zero = torch.zeros((), dtype=torch.int64)
    allowed = mask_function(zero, zero, q, k)
    return torch.equal(torch.as_tensor(allowed).expand(len(edges), len(edges)), (k <= q) & (k > q - window))


def register() -> None:
    """Makes both known to `transformers` in this process."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, causal_mask)
