"""The rotation's kernels against float64: angles, and all between a layer's projections and its attention."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from kernel_accuracy import KERNEL_TOLERANCES, Buffers, random_tensor, relative_error
from torch import Tensor

from rayllm_kernels.rope import reference
from rayllm_kernels.rope.triton import HeadNorm, Rotation, cos_sin, rope_and_write, rope_and_write_latent

PAGE = 4
SLOTS = (9, -1, 0, 23, 6)
EPS = 1e-5


class Shape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    in_pairs: bool = False
    normed: bool = False


SHAPES = [
    Shape(4, 2, 8, 8),
    Shape(7, 1, 20, 12, normed=True),
    Shape(3, 3, 24, 12, in_pairs=True),
    Shape(2, 2, 20, 20, in_pairs=True, normed=True),
    Shape(5, 5, 20, 0),
    Shape(17, 9, 128, 128),
]


class Layer(NamedTuple):
    """Random projections of `SLOTS`, and the definition of what becomes of them."""

    shape: Shape
    qkv_TAD: Tensor
    rotation: Rotation | None
    norm: HeadNorm | None

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, buffers: Buffers) -> Layer:
        num_all, num_normed = shape.num_heads + 2 * shape.num_kv_heads, shape.num_heads + shape.num_kv_heads
        qkv_TAD = buffers.input(random_tensor(len(SLOTS), num_all, shape.head_dim, dtype=dtype))
        rotation = norm = None
        if shape.rotary_dim:
            angles = random_tensor(len(SLOTS), shape.rotary_dim // 2, seed=1) * 3
            cos, sin = (buffers.input(torch.cat((f(angles),) * 2, dim=-1).to(dtype)) for f in (torch.cos, torch.sin))
            rotation = Rotation(cos, sin, shape.in_pairs)
        if shape.normed:
            norm = HeadNorm(buffers.input(random_tensor(num_normed, shape.head_dim, dtype=dtype, seed=2)), EPS)
        return cls(shape, qkv_TAD, rotation, norm)

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """(queries, keys, values) in float64."""
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        x = self.qkv_TAD.double()
        qk, v = x[:, : heads + kv_heads], x[:, heads + kv_heads :]
        if self.norm is not None:
            qk = qk / (qk.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * self.norm.weight_BD.double()
        if self.rotation is not None:
            width = self.shape.rotary_dim
            channels = torch.arange(width)
            first = channels[0::2] if self.shape.in_pairs else channels[: width // 2]
            second = channels[1::2] if self.shape.in_pairs else channels[width // 2 :]
            turn = torch.complex(*(each.double()[:, : width // 2] for each in self.rotation[:2])).unsqueeze(1)
            turned = torch.complex(qk[..., first], qk[..., second]) * turn
            qk = qk.clone()
            qk[..., first], qk[..., second] = turned.real, turned.imag
        return qk[:, :heads], qk[:, heads:], v


@pytest.mark.parametrize("dtype", KERNEL_TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_queries_come_back_and_keys_and_values_go_to_their_slots(
    shape: Shape, dtype: torch.dtype, buffers: Buffers
) -> None:
    layer = Layer.make(shape, dtype, buffers)
    cache = random_tensor(6, shape.num_kv_heads, PAGE, shape.head_dim, dtype=dtype, seed=3)
    caches = buffers.inout(cache), buffers.inout(cache + 1)
    q_THD = rope_and_write(layer.qkv_TAD, *caches, torch.tensor(SLOTS), layer.rotation, layer.norm)
    assert q_THD.is_contiguous()
    expected_q, expected_k, expected_v = layer.expected()
    assert relative_error(q_THD, expected_q) < KERNEL_TOLERANCES[dtype]
    untouched = torch.ones(6, PAGE, dtype=torch.bool)
    for token, slot in enumerate(SLOTS):
        if slot < 0:
            continue
        untouched[slot // PAGE, slot % PAGE] = False
        found_k, found_v = (each[slot // PAGE, :, slot % PAGE] for each in caches)
        assert relative_error(found_k, expected_k[token]) < KERNEL_TOLERANCES[dtype]
        assert torch.equal(found_v.double(), expected_v[token])
    for found, before in zip(caches, (cache, cache + 1), strict=True):
        assert torch.equal(found.transpose(1, 2)[untouched], before.transpose(1, 2)[untouched])


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_the_reference_has_the_same_result(shape: Shape, buffers: Buffers) -> None:
    layer = Layer.make(shape, torch.float32, buffers)
    found, expected = ([torch.zeros(6, shape.num_kv_heads, PAGE, shape.head_dim) for _ in "kv"] for _ in range(2))
    arguments = (torch.tensor(SLOTS), layer.rotation, layer.norm)
    q_THD = rope_and_write(layer.qkv_TAD, *found, *arguments)
    assert relative_error(q_THD, reference.rope_and_write(layer.qkv_TAD, *expected, *arguments).double()) < 1e-6
    for each, other in zip(found, expected, strict=True):
        assert relative_error(each, other.double()) < 1e-6


def test_caches_of_8_bits_hold_the_quotient_by_the_scale(buffers: Buffers) -> None:
    shape = Shape(2, 2, 16, 8)
    layer = Layer.make(shape, torch.bfloat16, buffers)
    layer = layer._replace(qkv_TAD=layer.qkv_TAD.clone())
    layer.qkv_TAD[0, 3, 9] = 1e4
    found, expected = ([torch.zeros(6, 2, PAGE, 16).to(torch.float8_e4m3fn) for _ in "kv"] for _ in range(2))
    arguments = (torch.tensor(SLOTS), layer.rotation, None, 0.25, 0.5)
    rope_and_write(layer.qkv_TAD, *found, *arguments)
    reference.rope_and_write(layer.qkv_TAD.float(), *expected, *arguments)
    for each, other in zip(found, expected, strict=True):
        assert torch.equal(each.view(torch.uint8), other.view(torch.uint8))
    assert float(found[0][SLOTS[0] // PAGE, 1, SLOTS[0] % PAGE, 9]) == 448


@pytest.mark.parametrize("dtype", KERNEL_TOLERANCES)
@pytest.mark.parametrize("in_pairs", [False, True])
def test_latents_and_keys_go_to_their_slots_and_queries_turn_where_they_are(
    in_pairs: bool, dtype: torch.dtype, buffers: Buffers
) -> None:
    """Against `rope_and_write`, whose rotation is tested above, and the norm's definition."""
    num_heads, head_dim, latent_dim, width = 5, 20, 18, 12
    layer = Layer.make(Shape(num_heads, 1, width, width, in_pairs), dtype, buffers)
    assert layer.rotation is not None
    q_THD = torch.cat((random_tensor(5, num_heads, head_dim - width, seed=4).to(dtype), layer.qkv_TAD[:, :5]), dim=-1)
    down_TW = torch.cat((random_tensor(5, latent_dim, seed=5).to(dtype), layer.qkv_TAD[:, 5]), dim=-1)
    turned_q, turned_k, _ = layer.expected()
    weight = buffers.input(random_tensor(latent_dim, seed=6))
    wide = down_TW[:, :latent_dim].double()
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()

    before = random_tensor(6, 1, PAGE, latent_dim + width, dtype=dtype, seed=3)
    cache, q = buffers.inout(before), buffers.inout(q_THD)
    slots = torch.tensor(SLOTS)
    rope_and_write_latent(q, buffers.input(down_TW), cache, slots, layer.rotation, weight, EPS)
    assert torch.equal(q[..., :-width], q_THD[..., :-width])
    assert relative_error(q[..., -width:], turned_q) < KERNEL_TOLERANCES[dtype]
    rows, expected = cache.view(-1, latent_dim + width), torch.cat((normed, turned_k[:, 0]), dim=-1)
    kept = slots >= 0
    assert relative_error(rows[slots[kept]], expected[kept]) < KERNEL_TOLERANCES[dtype]
    untouched = torch.ones(len(rows), dtype=torch.bool)
    untouched[slots[kept]] = False
    assert torch.equal(rows[untouched], before.view(-1, latent_dim + width)[untouched])

    other_cache, other_q = before.clone(), q_THD.clone()
    reference.rope_and_write_latent(other_q, down_TW, other_cache, slots, layer.rotation, weight, EPS)
    assert relative_error(q, other_q.double()) < KERNEL_TOLERANCES[dtype]
    assert relative_error(cache, other_cache.double()) < KERNEL_TOLERANCES[dtype]


def test_a_strided_projection_is_read_where_it_is(buffers: Buffers) -> None:
    whole = buffers.input(random_tensor(2, 10, 8))
    caches = [buffers.output(1, 2, PAGE, 8) for _ in "kv"]
    q_THD = rope_and_write(whole[:, 1:9], *caches, torch.tensor([3, 0]), None)
    assert torch.equal(q_THD, whole[:, 1:5])
    assert torch.equal(caches[1][0, :, 3], whole[0, 7:9])


@pytest.mark.parametrize("dtype", KERNEL_TOLERANCES)
def test_cosines_and_sines_are_exact_however_far_a_token_stands(dtype: torch.dtype) -> None:
    positions = torch.cat((torch.arange(20), torch.tensor([4095, 131_071, 1_000_003, 9_999_991])))
    frequencies = torch.cat((1 / 10000 ** (torch.arange(0, 26, 2) / 26),) * 2)
    angles = (positions.float().unsqueeze(1) * frequencies).double()
    cos, sin = cos_sin(positions, frequencies, 1.3, dtype)
    assert relative_error(cos, angles.cos() * 1.3) < KERNEL_TOLERANCES[dtype]
    assert relative_error(sin, angles.sin() * 1.3) < KERNEL_TOLERANCES[dtype]


def test_tokens_beyond_the_boundary_turn_by_the_other_frequencies() -> None:
    positions, beyond_T = torch.arange(5), torch.tensor([False, True, True, False, True])
    frequencies, others = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)).unbind()
    beyond = (beyond_T, others, 2.0)
    expected = reference.cos_sin(positions, frequencies, 1.0, torch.float32, beyond)
    for found, each in zip(cos_sin(positions, frequencies, 1.0, torch.float32, beyond), expected, strict=True):
        assert relative_error(found, each.double()) < 1e-6
