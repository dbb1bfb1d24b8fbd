"""Which tensors of a checkpoint make each parameter of a `transformers` model, by the conversions that `transformers`
itself declares for it: renamed, stacked, joined, split or transposed tensors. A rank reads only its own bytes of these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rayllm.errors import ConfigError
from rayllm.weights.stored import Region, Stored

if TYPE_CHECKING:
    from rayllm.weights.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Made:
    """A parameter made of tensors of a checkpoint: base of what follows."""

    parts: tuple[Made, ...]

    @property
    def name(self) -> str:
        return self.parts[0].name

    def renamed(self, rename: Callable[[str], str]) -> Stored:
        return self

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        raise NotImplementedError

    def read(self, checkpoint: Checkpoint, region: Region) -> torch.Tensor:
        raise NotImplementedError

    def use(self, checkpoint: Checkpoint) -> None:
        """Counts the tensors as used."""
        for part in self.parts:
            part.use(checkpoint)

    def check(self, checkpoint: Checkpoint, shape: Sequence[int]) -> None:
        self.use(checkpoint)
        found = self.shape(checkpoint)
        if tuple(found) != tuple(shape):
            raise ConfigError(
                f"{checkpoint.file_of(self.name)}: tensor {self.name!r} makes a parameter of shape {list(found)}, but "
                f"config.json requires {list(shape)}"
            )


@dataclass(frozen=True, slots=True)
class One(Made):
    """A tensor as it is."""

    tensor: str = ""

    @property
    def name(self) -> str:
        return self.tensor

    def use(self, checkpoint: Checkpoint) -> None:
        checkpoint.check_shape(self.tensor, checkpoint.shape_of(self.tensor))

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        return checkpoint.shape_of(self.tensor)

    def read(self, checkpoint: Checkpoint, region: Region) -> torch.Tensor:
        return checkpoint.read(self.tensor, region)


@dataclass(frozen=True, slots=True)
class Stacked(Made):
    """Tensors of one shape, with a new first dimension."""

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        shapes = {part.shape(checkpoint) for part in self.parts}
        if len(shapes) > 1:
            raise ConfigError(f"tensors {self.parts[0].name!r} to {self.parts[-1].name!r} differ in shape")
        return (len(self.parts), *shapes.pop())

    def read(self, checkpoint: Checkpoint, region: Region) -> torch.Tensor:
        return torch.stack([self.parts[index].read(checkpoint, region[1:]) for index in region[0]])


@dataclass(frozen=True, slots=True)
class Joined(Made):
    """Tensors one after another along `dim`."""

    dim: int = 0

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        shapes = [part.shape(checkpoint) for part in self.parts]
        size = sum(shape[self.dim] for shape in shapes)
        return (*shapes[0][: self.dim], size, *shapes[0][self.dim + 1 :])

    def read(self, checkpoint: Checkpoint, region: Region) -> torch.Tensor:
        wanted, place, found = region[self.dim], 0, []
        for part in self.parts:
            size = part.shape(checkpoint)[self.dim]
            first, last = max(wanted.start - place, 0), min(wanted.stop - place, size)
            if first < last:
                found.append(part.read(checkpoint, _with(region, self.dim, range(first, last))))
            place += size
        return torch.cat(found, dim=self.dim)


@dataclass(frozen=True, slots=True)
class Piece(Made):
    """`size` of a tensor along `dim`, from `start`."""

    dim: int = 0
    start: int = 0
    size: int = 0

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        whole = self.parts[0].shape(checkpoint)
        return (*whole[: self.dim], self.size, *whole[self.dim + 1 :])

    def read(self, checkpoint: Checkpoint, region: Region) -> torch.Tensor:
        rows = region[self.dim]
        moved = range(rows.start + self.start, rows.stop + self.start)
        return self.parts[0].read(checkpoint, _with(region, self.dim, moved))


@dataclass(frozen=True, slots=True)
class Swapped(Made):
    """A tensor with two dimensions exchanged."""

    dims: tuple[int, int] = (0, 1)

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        return _exchanged(self.parts[0].shape(checkpoint), self.dims)

    def read(self, checkpoint: Checkpoint, region: Region) -> torch.Tensor:
        return self.parts[0].read(checkpoint, _exchanged(region, self.dims)).transpose(*self.dims)


def stored_parameters(model: Any, checkpoint: Checkpoint) -> dict[str, Made]:
    """Where each parameter and saved buffer of `model` (of any device, "meta" too) stands; one that the checkpoint
    lacks, where it would. `ConfigError` for a conversion that is not known here."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    of_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    wanted, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Made] = {}
    sources: dict[str, dict[str, list[Made]]] = {}
    for name in sorted(checkpoint.names(), key=_natural):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if target not in wanted:
            continue
        if pattern is None:
            found[target] = One((), name)
        else:
            sources.setdefault(target, {}).setdefault(pattern, []).append(One((), name))
    for target, by_pattern in sources.items():
        converter = of_pattern[next(iter(by_pattern))]
        shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
        found |= _converted(converter, target, by_pattern, shapes, checkpoint)
    _add_tied(found, getattr(model, "all_tied_weights_keys", None) or {})
    return {**{name: One((), name) for name in wanted}, **found}


def _converted(
    converter: Any,
    target: str,
    by_pattern: Mapping[str, list[Made]],
    shapes: Mapping[str, tuple[int, ...]],
    checkpoint: Checkpoint,
) -> dict[str, Made]:
    """What a converter makes of the tensors of each of its patterns; `target` is the first parameter's name."""
    targets = [target.replace(converter.target_patterns[0], each, 1) for each in converter.target_patterns]
    lists = {pattern: by_pattern[pattern] for pattern in converter.source_patterns if pattern in by_pattern}
    for operation in converter.operations:
        kind = type(operation).__name__
        first = next(iter(lists.values()))[0]
        if kind == "MergeModulelist" and operation.dim == 0:
            lists = {pattern: [Stacked(tuple(parts))] for pattern, parts in lists.items()}
        elif kind == "Concatenate":
            lists = {target: [Joined(tuple(part for parts in lists.values() for part in parts), operation.dim)]}
        elif kind == "Transpose":
            if not (operation.check_dims and first.shape(checkpoint) == shapes[target]):
                lists = {target: [Swapped((first,), (operation.dim0, operation.dim1))]}
        elif kind in ("Chunk", "Split") and getattr(operation, "num_shards_attribute", None) is None:
            whole = first.shape(checkpoint)[operation.dim]
            each = (
                [whole // len(targets)] * len(targets)
                if kind == "Chunk"
                else [shapes[name][operation.dim] for name in targets]
            )
            starts = [sum(each[:index]) for index in range(len(each))]
            return {
                name: Piece((first,), operation.dim, start, size)
                for name, start, size in zip(targets, starts, each, strict=True)
            }
        else:
            raise ConfigError(
                f"{checkpoint.file_of(first.name)}: tensor {first.name!r} needs the conversion {kind} of transformers, "
                "which is not supported: load the model with transformers and save it with save_original_format=False"
            )
    made = [part for parts in lists.values() for part in parts]
    if len(made) != 1:
        raise ConfigError(f"{checkpoint.file_of(made[0].name)}: tensors {made[0].name!r} … make no one parameter")
    return {target: made[0]}


def _add_tied(found: dict[str, Made], tied: Mapping[str, str]) -> None:
    """Parameters that are the same as another one, whichever of the two the checkpoint holds."""
    for target, source in tied.items():
        if source in found:
            found[target] = found[source]
        elif target in found:
            found[source] = found[target]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts by numbers in names: expert 2 before expert 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _with(region: Region, dim: int, part: range) -> Region:
    return (*region[:dim], part, *region[dim + 1 :])


def _exchanged(values: tuple[Any, ...], dims: tuple[int, int]) -> tuple[Any, ...]:
    changed = list(values)
    changed[dims[0]], changed[dims[1]] = changed[dims[1]], changed[dims[0]]
    return tuple(changed)
