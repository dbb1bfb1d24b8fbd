"""Whether a model can be split over ranks. Plain Python: this is known before any process starts."""

from __future__ import annotations

from rayllm.errors import ConfigError
from rayllm.layout import ParallelLayout
from rayllm.spec import DecoderSpec, SparseMlpSpec


def check_split(spec: DecoderSpec, layout: ParallelLayout) -> None:
    """`ConfigError` where the model's heads, feed-forward widths or experts cannot be shared out over the ranks of a
    stage."""
    tp_size = layout.tp
    if spec.transformers is not None and tp_size > 1:
        _check_plan(spec, layout)
    is_dense = spec.transformers is None and not any(
        isinstance(each.feed_forward, SparseMlpSpec) for each in spec.layers
    )
    if layout.expert_parallel and is_dense:
        raise ConfigError(f"enable_expert_parallel: {spec.architecture} has no experts to share out; leave it off")
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


def _check_plan(spec: DecoderSpec, layout: ParallelLayout) -> None:
    """The same of a model that `transformers` computes, whose own plan says what is split: no head is repeated."""
    assert spec.transformers is not None
    tp_size = layout.tp
    if layout.expert_parallel:
        raise ConfigError(
            f"enable_expert_parallel cannot split {spec.architecture}, which runs through transformers: leave it out, "
            "then each rank holds a part of every expert"
        )
    if spec.transformers.unsplittable:
        raise ConfigError(
            f"tensor_parallel_size={tp_size} cannot split {spec.architecture}, which runs through transformers: "
            f"{spec.transformers.unsplittable}; use tensor_parallel_size=1 (-tp 1)"
        )
    for attention in spec.attentions():
        for size in attention.split_sizes():
            if size.size % tp_size:
                raise ConfigError(
                    f"tensor_parallel_size={tp_size} cannot split a model with {size.field}={size.size} that runs "
                    "through transformers: it must divide it"
                )
