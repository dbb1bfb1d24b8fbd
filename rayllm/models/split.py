"""Whether a model can be split over ranks. Plain Python: this is known before any process starts."""

from __future__ import annotations

from rayllm.errors import ConfigError
from rayllm.layout import ParallelLayout
from rayllm.spec import DecoderSpec


def check_split(spec: DecoderSpec, layout: ParallelLayout) -> None:
    """`ConfigError` where the model's heads, feed-forward widths or experts cannot be shared out over the ranks of a
    stage."""
    tp_size = layout.tp
    for layer in spec.layers:
        sizes = (*layer.attention.split_sizes(), *layer.feed_forward.split_sizes(layout.expert_parallel))
        if all(each.allows(tp_size) for each in sizes):
            continue
        found = ", ".join(f"{each.field}={each.size}" for each in sizes)
        divided = " and ".join(each.field for each in sizes if not each.may_repeat)
        repeated = [f", and divide {each.field} or be a multiple of it" for each in sizes if each.may_repeat]
        raise ConfigError(
            f"tensor_parallel_size={tp_size} cannot split a model with {found}; it must divide {divided}"
            + "".join(repeated)
        )
