"""Where a parameter stands in a checkpoint: a tensor, or rows of one, a transposed or normalized one, or a stack of
several.

An architecture's `names` map RayLLM's modules to these. A plain string is a `Tensor`. `{}` in a name is the number of
the layer, `{expert}` that of the expert. torch is imported by what reads, so that a spec is read without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from rayllm.weights.checkpoint import Checkpoint

Region = tuple[range, ...]
"""What is wanted of a tensor: a range of step 1 for each of its dimensions."""


class Stored(Protocol):
    """A parameter's place in a checkpoint, with the names' placeholders filled in."""

    @property
    def name(self) -> str:
        """The tensor that an error names."""

    def renamed(self, rename: Callable[[str], str]) -> Stored:
        """The same with every tensor's name changed."""

    def check(self, checkpoint: Checkpoint, shape: Sequence[int]) -> None:
        """`ConfigError` that names the tensor where the checkpoint does not hold a parameter of this shape. Its tensors
        count as used from then on, whichever of them this rank reads."""

    def read(self, checkpoint: Checkpoint, region: Region) -> torch.Tensor:
        """This region of the parameter, in the checkpoint's dtype; nothing else is read, except between rows that are
        not neighbours."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the checkpoint as it is."""

    name: str

    def renamed(self, rename: Callable[[str], str]) -> Tensor:
        return Tensor(rename(self.name))

    def check(self, checkpoint: Checkpoint, shape: Sequence[int]) -> None:
        checkpoint.check_shape(self.name, shape)

    def read(self, checkpoint: Checkpoint, region: Region) -> torch.Tensor:
        return checkpoint.read(self.name, region)


@dataclass(frozen=True, slots=True)
class Transposed:
    """A matrix (of each expert) that is stored as [inputs, outputs], as by GPT-2's `Conv1D`; a bias is what it is."""

    of: Stored

    @property
    def name(self) -> str:
        return self.of.name

    def renamed(self, rename: Callable[[str], str]) -> Transposed:
        return Transposed(self.of.renamed(rename))

    def check(self, checkpoint: Checkpoint, shape: Sequence[int]) -> None:
        self.of.check(checkpoint, (*shape[:-2], *reversed(shape[-2:])))

    def read(self, checkpoint: Checkpoint, region: Region) -> torch.Tensor:
        found = self.of.read(checkpoint, (*region[:-2], *reversed(region[-2:])))
        return found.transpose(-1, -2) if found.dim() > 1 else found


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows (outputs) of a stored tensor with `num_rows` of them, in the order of `ranges`: one of several parameters
    that are fused into it, or all of its rows in another order."""

    of: Stored
    ranges: tuple[range, ...]
    num_rows: int
    dim: int = 0
    """Of the rows: 1 where those of each expert are meant."""

    @property
    def name(self) -> str:
        return self.of.name

    def renamed(self, rename: Callable[[str], str]) -> Rows:
        return Rows(self.of.renamed(rename), self.ranges, self.num_rows, self.dim)

    def check(self, checkpoint: Checkpoint, shape: Sequence[int]) -> None:
        assert sum(map(len, self.ranges)) == shape[self.dim], (self, shape)
        self.of.check(checkpoint, (*shape[: self.dim], self.num_rows, *shape[self.dim + 1 :]))

    def read(self, checkpoint: Checkpoint, region: Region) -> torch.Tensor:
        import torch

        parts = [self._read(checkpoint, part, region) for part in _cut(self.ranges, region[self.dim])]
        if not parts:
            return self._read(checkpoint, range(0), region)
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def _read(self, checkpoint: Checkpoint, rows: range, region: Region) -> torch.Tensor:
        before, after = region[: self.dim], region[self.dim + 1 :]
        if rows.step == 1:
            return self.of.read(checkpoint, (*before, rows, *after))
        found = self.of.read(checkpoint, (*before, range(rows[0], rows[-1] + 1), *after))
        return found[(slice(None),) * self.dim + (slice(None, None, rows.step),)]


@dataclass(frozen=True, slots=True)
class UnitRows:
    """A matrix of `num_columns` inputs whose rows are divided by their Euclidean norms; rows of zeros stay."""

    of: Stored
    num_columns: int

    @property
    def name(self) -> str:
        return self.of.name

    def renamed(self, rename: Callable[[str], str]) -> UnitRows:
        return UnitRows(self.of.renamed(rename), self.num_columns)

    def check(self, checkpoint: Checkpoint, shape: Sequence[int]) -> None:
        assert shape[1] == self.num_columns, (self, shape)
        self.of.check(checkpoint, shape)

    def read(self, checkpoint: Checkpoint, region: Region) -> torch.Tensor:
        from torch.nn.functional import normalize

        rows, columns = region
        found = self.of.read(checkpoint, (rows, range(self.num_columns)))
        unit = normalize(found.float(), dim=1).to(found.dtype)
        return unit[:, columns.start : columns.stop]


@dataclass(frozen=True, slots=True)
class Stack:
    """A parameter with a leading dimension of experts, each stored as a tensor of its own: `{expert}` in its name."""

    of: Stored

    @property
    def name(self) -> str:
        return self._of(0).name

    def renamed(self, rename: Callable[[str], str]) -> Stack:
        return Stack(self.of.renamed(rename))

    def check(self, checkpoint: Checkpoint, shape: Sequence[int]) -> None:
        for expert in range(shape[0]):
            self._of(expert).check(checkpoint, shape[1:])

    def read(self, checkpoint: Checkpoint, region: Region) -> torch.Tensor:
        import torch

        return torch.stack([self._of(expert).read(checkpoint, region[1:]) for expert in region[0]])

    def _of(self, expert: int) -> Stored:
        return self.of.renamed(lambda name: name.replace("{expert}", str(expert)))


@dataclass(frozen=True, slots=True)
class Ones:
    """A weight that no file holds: the model has none there, and one of ones changes nothing."""

    name: str = ""

    def renamed(self, rename: Callable[[str], str]) -> Ones:
        return self

    def check(self, checkpoint: Checkpoint, shape: Sequence[int]) -> None:
        pass

    def read(self, checkpoint: Checkpoint, region: Region) -> torch.Tensor:
        import torch

        return torch.ones([len(part) for part in region])


@dataclass(frozen=True, slots=True)
class FirstOf:
    """One of several places: the first that the checkpoint has, for names that differ between its versions."""

    of: tuple[Stored, ...]

    @property
    def name(self) -> str:
        return self.of[0].name

    def renamed(self, rename: Callable[[str], str]) -> FirstOf:
        return FirstOf(tuple(place.renamed(rename) for place in self.of))

    def check(self, checkpoint: Checkpoint, shape: Sequence[int]) -> None:
        self.found(checkpoint).check(checkpoint, shape)

    def read(self, checkpoint: Checkpoint, region: Region) -> torch.Tensor:
        return self.found(checkpoint).read(checkpoint, region)

    def found(self, checkpoint: Checkpoint) -> Stored:
        """The place that counts; the first where the checkpoint has none of them."""
        return next((place for place in self.of if place.name in checkpoint), self.of[0])


def split_rows(fused: str | Stored, *sizes: int) -> tuple[Rows, ...]:
    """Parameters fused one after another: `q, k, v = split_rows("layers.{}.qkv_proj", 64, 16, 16)`."""
    return interleaved_rows(fused, 1, *sizes)


def interleaved_rows(fused: str | Stored, num_groups: int, *sizes: int) -> tuple[Rows, ...]:
    """Parameters fused group by group: `num_groups` times `sizes[0]` rows of the first, `sizes[1]` of the second, and
    so on, as the queries, keys and values of each head stand in GPT-NeoX."""
    stride = sum(sizes)
    whole: Stored = Tensor(fused) if isinstance(fused, str) else fused
    parts, offset = [], 0
    for size in sizes:
        starts = range(offset, offset + num_groups * stride, stride)
        parts.append(Rows(whole, tuple(range(start, start + size) for start in starts), num_groups * stride))
        offset += size
    return tuple(parts)


def _cut(ranges: tuple[range, ...], wanted: range) -> Iterator[range]:
    """The parts of `ranges`, counted one after another, whose places lie in `wanted`."""
    place = 0
    for each in ranges:
        first, last = max(wanted.start - place, 0), min(wanted.stop - place, len(each))
        if first < last:
            yield each[first:last]
        place += len(each)
