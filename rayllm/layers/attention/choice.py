"""Which attention backend computes a model: chosen once, at start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import chain

import torch

from rayllm.errors import ConfigError
from rayllm.layers.attention.backend import AttentionBackend, AttentionGroup, LayerAttention
from rayllm.layers.attention.flash_attention import FlashAttentionBackend
from rayllm.layers.attention.flashinfer import FlashInferBackend
from rayllm.layers.attention.gathered import GatheredBackend
from rayllm.layers.attention.needs import AttentionNeeds
from rayllm.layers.attention.triton import TritonBackend
from rayllm.layers.batch import Batch
from rayllm_kernels.attention import refusal_of_kernels
from rayllm_kernels.device import uses_triton

log = logging.getLogger(__name__)

_LIBRARIES: tuple[type[FlashAttentionBackend] | type[FlashInferBackend], ...] = (
    FlashAttentionBackend,
    FlashInferBackend,
)
_GPU_TYPES = ("cuda",)
"""Devices that libraries compute on."""
_NUM_PROMPTS, _PROMPT_TOKENS = 2, 1024
"""Of the measurement."""
_NUM_WARM_UPS, _NUM_RUNS = 2, 5


def choose_backend(
    groups: Sequence[Sequence[AttentionGroup]], needs: AttentionNeeds, wanted: str = "auto"
) -> AttentionBackend:
    """The backend for all layers of a model. `groups` are those of each KV group. `ConfigError` where the one that is
    `wanted` cannot compute the model here.

    `auto` gathers on a CPU. On a GPU it takes RayLLM's kernels, or a library's that is installed, can compute the
    model, and is faster at prompts of this model's shapes, which is measured.
    """
    if wanted != "auto":
        if reason := _refusal(wanted, groups, needs):
            raise ConfigError(f"attention_backend={wanted!r} cannot be used: {reason}; give auto or another backend")
        return _made(wanted, groups, needs)
    if reason := _refusal(TritonBackend.name, groups, needs):
        if needs.device.type != "cpu":
            log.info("attention gathers pages, slower than RayLLM's kernels: %s", reason)
        return _made(GatheredBackend.name, groups, needs)
    ours = _made(TritonBackend.name, groups, needs)
    usable = [each.name for each in _LIBRARIES if needs.device.type in _GPU_TYPES and not each.refusal(needs)]
    if not usable:
        return ours
    return _fastest([ours, *_made_where_possible(usable, groups, needs)], groups, needs)


def _refusal(name: str, groups: Sequence[Sequence[AttentionGroup]], needs: AttentionNeeds) -> str:
    """Why a backend cannot compute the model here; empty where it can."""
    if name == GatheredBackend.name:
        return ""
    if not uses_triton(torch.empty(0, device=needs.device)):
        return f"it needs a GPU, and a {needs.device.type} has only 'gathered'"
    for group in chain(*groups):
        head_dim = 0 if group.shares_cache else group.head_dim  # latents may be of any width
        if reason := refusal_of_kernels(head_dim, needs.block_size):
            return reason
    return next((each.refusal(needs) for each in _LIBRARIES if each.name == name), "")


def _made(name: str, groups: Sequence[Sequence[AttentionGroup]], needs: AttentionNeeds) -> AttentionBackend:
    classes = {each.name: each for each in (GatheredBackend, TritonBackend, *_LIBRARIES)}
    return classes[name](groups, needs.dtype, needs.device)


def _made_where_possible(
    names: Sequence[str], groups: Sequence[Sequence[AttentionGroup]], needs: AttentionNeeds
) -> list[AttentionBackend]:
    """Libraries that are installed may still fail to load, by what they were built for."""
    made = []
    for name in names:
        try:
            made.append(_made(name, groups, needs))
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            log.warning("attention backend %r is installed but cannot be used: %s", name, error)
    return made


def _fastest(
    backends: Sequence[AttentionBackend], groups: Sequence[Sequence[AttentionGroup]], needs: AttentionNeeds
) -> AttentionBackend:
    """By the time of a layer's attention to prompts. The first one, ours, counts where another fails."""
    seconds: dict[AttentionBackend, float] = {}
    for backend in backends:
        try:
            seconds[backend] = _seconds_of_prompts(backend, groups, needs)
        except Exception as error:
            if backend is backends[0]:
                raise
            log.warning("attention backend %r fails and is not used: %s", backend.name, error)
    found = ", ".join(f"{backend.name} {1000 * each:.3f} ms" for backend, each in seconds.items())
    log.info("a layer's attention to %d prompts of %d tokens: %s", _NUM_PROMPTS, _PROMPT_TOKENS, found)
    return min(seconds, key=seconds.__getitem__)


def _seconds_of_prompts(
    backend: AttentionBackend, groups: Sequence[Sequence[AttentionGroup]], needs: AttentionNeeds
) -> float:
    """Of one of the model's layers."""
    group, spec = groups[0][0], needs.grouped()[0]
    num_blocks = -(-_PROMPT_TOKENS // needs.block_size)
    table_RB = torch.arange(_NUM_PROMPTS * num_blocks, dtype=torch.int32, device=needs.device).view(_NUM_PROMPTS, -1)
    num_tokens = _NUM_PROMPTS * _PROMPT_TOKENS
    tokens_T = torch.arange(num_tokens, device=needs.device)
    batch = Batch(
        token_ids_T=tokens_T,
        positions_T=tokens_T % _PROMPT_TOKENS,
        slots_ST=tokens_T.expand(len(groups), -1),
        query_starts=list(range(0, num_tokens + 1, _PROMPT_TOKENS)),
        kv_lens=[_PROMPT_TOKENS] * _NUM_PROMPTS,
        block_table_SRB=table_RB.expand(len(groups), -1, -1),
        logits_indices_N=tokens_T[:0],
        num_decode_rows=0,
        block_size=needs.block_size,
    ).with_device_rows()
    q_THD, k_TKD = (
        torch.randn(num_tokens, heads, group.head_dim, dtype=needs.dtype, device=needs.device)
        for heads in (spec.num_heads // needs.tp_size, group.num_kv_heads)
    )
    shape = (table_RB.numel(), group.num_kv_heads, needs.block_size, group.head_dim)
    kv = tuple(torch.randn(shape, dtype=needs.dtype, device=needs.device) for _ in range(2))
    layer = LayerAttention(group, spec.scale, spec.soft_cap)
    metadata = backend.prepare(batch)[0]
    return _seconds_per_run(lambda: backend.forward(q_THD, k_TKD, k_TKD, kv, metadata, layer))


def _seconds_per_run(run: Callable[[], object]) -> float:
    for _ in range(_NUM_WARM_UPS):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(_NUM_RUNS):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / _NUM_RUNS
