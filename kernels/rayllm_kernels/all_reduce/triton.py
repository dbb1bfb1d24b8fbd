"""All-reduce by kernels that write and read peers' memory. A wait for a peer also looks at the abort word."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.all_reduce.peers import MAX_PROGRAMS, Peers, flags_bytes
from rayllm_kernels.launch import launch

_CHUNK_BYTES = 4096
_NUM_WARPS = 8


def one_shot(x: Tensor, peers: Peers) -> None:
    """See the package; at most `MAX_PROGRAMS` chunks of 4 KiB."""
    _check(x, peers)
    block = _CHUNK_BYTES // x.element_size()
    num_programs = triton.cdiv(x.numel(), block)
    if num_programs > MAX_PROGRAMS:
        raise ValueError(f"a one-shot all-reduce takes up to {MAX_PROGRAMS * _CHUNK_BYTES} bytes, not {x.nbytes}")
    launch(_one_shot, (num_programs,), x, *_arguments(x, peers), **_constants(x, peers), BLOCK=block)


def two_shot(x: Tensor, peers: Peers) -> None:
    """See the package."""
    _check(x, peers)
    block = _CHUNK_BYTES // x.element_size()
    num_chunks = triton.cdiv(x.numel(), block * peers.size)  # of each rank's share
    launch(
        _two_shot,
        (min(num_chunks, MAX_PROGRAMS),),
        x,
        *_arguments(x, peers),
        num_chunks,
        **_constants(x, peers),
        BLOCK=block,
    )


def _check(x: Tensor, peers: Peers) -> None:
    if not x.is_contiguous():
        raise ValueError(f"an all-reduce takes a contiguous tensor, not one of strides {x.stride()}")
    if x.nbytes > peers.capacity_bytes:
        raise ValueError(f"a message of {x.nbytes} bytes is longer than the {peers.capacity_bytes} that ranks share")


def _arguments(x: Tensor, peers: Peers) -> tuple[Tensor | int, ...]:
    num_groups = x.numel() // _group(x)
    return peers.addresses_W, peers.calls, peers.abort, num_groups, flags_bytes(peers.size), peers.capacity_bytes


def _group(x: Tensor) -> int:
    """Elements by which the length is counted: a multiple of 16 can be read and written 16 bytes at a time, and is so
    for rows of any model."""
    return 16 if x.numel() % 16 == 0 else 1


def _constants(x: Tensor, peers: Peers) -> dict[str, int]:
    padded = triton.next_power_of_2(peers.size)
    return {
        "GROUP": _group(x),
        "RANK": peers.rank,
        "SIZE": peers.size,
        "PADDED_SIZE": padded,
        "MAX_PROGRAMS": MAX_PROGRAMS,
        "num_warps": _NUM_WARPS,
    }


@triton.jit(do_not_specialize=["num_groups"])
def _one_shot(
    x_ptr,
    addresses_ptr,
    calls_ptr,
    abort_ptr,
    num_groups,
    flags_bytes,
    capacity_bytes,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    numel = num_groups * GROUP
    call = tl.load(calls_ptr) + 1
    area = flags_bytes + (call % 2) * capacity_bytes
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    own = _values(addresses_ptr, RANK, area, x_ptr)
    tl.store(own + at, tl.load(x_ptr + at, mask=mask), mask=mask)
    _meet(addresses_ptr, abort_ptr, call, 0, RANK, SIZE, PADDED_SIZE, MAX_PROGRAMS)
    total = _sum_peers(addresses_ptr, area, x_ptr, at, mask, SIZE, BLOCK)
    tl.store(x_ptr + at, total.to(x_ptr.dtype.element_ty), mask=mask)
    _end(calls_ptr, call)


@triton.jit(do_not_specialize=["num_groups", "num_chunks"])
def _two_shot(
    x_ptr,
    addresses_ptr,
    calls_ptr,
    abort_ptr,
    num_groups,
    flags_bytes,
    capacity_bytes,
    num_chunks,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    numel = num_groups * GROUP
    call = tl.load(calls_ptr) + 1
    area = flags_bytes + (call % 2) * capacity_bytes
    own = _values(addresses_ptr, RANK, area, x_ptr)
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        for peer in tl.static_range(SIZE):
            at = (peer * num_chunks + chunk) * BLOCK + tl.arange(0, BLOCK)
            tl.store(own + at, tl.load(x_ptr + at, mask=at < numel), mask=at < numel)
    _meet(addresses_ptr, abort_ptr, call, 0, RANK, SIZE, PADDED_SIZE, MAX_PROGRAMS)
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        # Of this rank's own share no peer reads the values, only their sum: it takes their place.
        at = (RANK * num_chunks + chunk) * BLOCK + tl.arange(0, BLOCK)
        total = _sum_peers(addresses_ptr, area, x_ptr, at, at < numel, SIZE, BLOCK)
        tl.store(own + at, total.to(x_ptr.dtype.element_ty), mask=at < numel)
    _meet(addresses_ptr, abort_ptr, call, 1, RANK, SIZE, PADDED_SIZE, MAX_PROGRAMS)
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        for peer in tl.static_range(SIZE):
            at = (peer * num_chunks + chunk) * BLOCK + tl.arange(0, BLOCK)
            theirs = _values(addresses_ptr, peer, area, x_ptr)
            tl.store(x_ptr + at, tl.load(theirs + at, mask=at < numel), mask=at < numel)
    _end(calls_ptr, call)


@triton.jit
def _values(addresses_ptr, rank, area, x_ptr):
    """Where the values of a rank are. Without the hint each would be loaded alone."""
    return tl.multiple_of((tl.load(addresses_ptr + rank) + area).to(x_ptr.dtype), 16)


@triton.jit
def _sum_peers(addresses_ptr, area, x_ptr, at, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The values of all ranks, in float32, in order of rank."""
    total = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(SIZE):
        theirs = _values(addresses_ptr, peer, area, x_ptr)
        total += tl.load(theirs + at, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _meet(
    addresses_ptr,
    abort_ptr,
    call,
    stage: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """Tells this program's like in every rank that this one has come here, with all that it has written, and waits for
    theirs. Returns early where the abort word is set."""
    peers = tl.arange(0, PADDED_SIZE)
    real = peers < SIZE
    place = (stage * MAX_PROGRAMS + tl.program_id(0)) * SIZE
    tl.debug_barrier()  # all threads have written
    addresses = tl.load(addresses_ptr + peers, mask=real, other=0)
    theirs = addresses.to(tl.pointer_type(tl.int64)) + place + RANK
    calls = tl.full([PADDED_SIZE], 0, tl.int64) + call
    tl.atomic_xchg(theirs, calls, mask=real, sem="release", scope="sys")
    own = tl.load(addresses_ptr + RANK).to(tl.pointer_type(tl.int64)) + place + peers
    num_missing, num_looks = 1, 0
    while num_missing > 0:
        seen = tl.load(own, mask=real, other=call, volatile=True)
        num_missing = tl.sum((seen < call).to(tl.int32))
        num_looks += 1
        # The word is in the host's memory: a look at it takes longer than one at the flags.
        aborted = tl.load(abort_ptr, mask=num_looks % 256 == 0, other=0, volatile=True)
        num_missing = tl.where(aborted != 0, 0, num_missing)
    tl.atomic_add(own, tl.zeros([PADDED_SIZE], tl.int64), mask=real, sem="acquire", scope="sys")
    tl.debug_barrier()  # what all peers have written is seen by all threads


@triton.jit
def _end(calls_ptr, call):
    """The last program to end counts the call: by then all have read its number."""
    tl.debug_barrier()
    if tl.atomic_add(calls_ptr + 1, 1) == tl.num_programs(0) - 1:
        tl.store(calls_ptr + 1, tl.zeros([], tl.int64))
        tl.store(calls_ptr, call)
