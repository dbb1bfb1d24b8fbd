"""Builds a `transformers` model for a rank: made without memory, its layers replaced, the rank's weights read."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rayllm.distributed.groups import TensorParallel
from rayllm.errors import ConfigError
from rayllm.layers.attention import AttentionBackend, choose_backend
from rayllm.layers.embedding import vocab_part
from rayllm.models.decoder import attention_groups, attention_needs
from rayllm.models.fallback import attention, parallel
from rayllm.models.fallback.decoder import TransformersDecoder
from rayllm.models.fallback.names import stored_parameters
from rayllm.models.fallback.parallel import ParallelLinear, SplitEmbedding, SummedOutput
from rayllm.models.fallback.probe import probe
from rayllm.models.fallback.spec import one_line
from rayllm.models.layer import ATTENTION_LAYERS
from rayllm.spec import DecoderSpec, GroupedAttentionSpec
from rayllm.weights.checkpoint import Checkpoint
from rayllm.weights.checkpoint_weights import CheckpointWeights
from rayllm.weights.progress import LoadProgress
from rayllm.weights.source import DummyWeights, WeightSource

log = logging.getLogger(__name__)


def empty_model(spec: DecoderSpec, model_path: str, dtype: torch.dtype) -> Any:
    """The causal model on the device "meta". `ConfigError` where `transformers` cannot make it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    assert spec.transformers is not None
    fields = json.loads(spec.transformers.config)
    runs_code = bool(spec.transformers.code_files)
    try:
        if runs_code:
            config = AutoConfig.from_pretrained(model_path, trust_remote_code=True, local_files_only=True)
        else:
            config = AutoConfig.for_model(**fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=runs_code
            )
    except Exception as error:
        raise ConfigError(f"transformers cannot make {spec.architecture}: {one_line(error)}") from error
    return model.eval()


class ModelParts:
    """Fills an empty model: reads a rank's parameters and puts them, or layers of ours, in place."""

    def __init__(self, model: Any, weights: WeightSource, tp: TensorParallel, device: torch.device):
        self._model = model
        self._weights = weights
        self._tp = tp
        self._device = device
        self._words = _Words(getattr(model, "_tp_plan", None) or {})
        self._float32 = _float32_modules(model)
        self._tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        self._filled: dict[str, tuple[Tensor, str]] = {}
        self.parallel: list[ParallelLinear | SplitEmbedding | SummedOutput] = []
        """Whatever computes with other ranks."""

    def fill(self) -> None:
        """`ConfigError` where a module cannot be split as the model's plan says."""
        for name, module in list(self._model.named_modules()):
            try:
                self._fill(name, module)
            except ValueError as error:
                raise ConfigError(
                    f"tensor_parallel_size={self._tp.size} cannot split {type(self._model).__name__}: {error}; "
                    "use tensor_parallel_size=1"
                ) from None

    def _fill(self, name: str, module: nn.Module) -> None:
        word = self._words.of(name) if self._tp.size > 1 else ""
        self._make_buffers(module)
        is_float32 = self._float32 is not None and bool(self._float32.search(f"{name}."))
        if type(module) is nn.Linear and not is_float32:
            linear = parallel.make_linear(self._weights, name, module, word, self._tp, self._tied_weight(name, word))
            self._replace(name, linear)
            return
        if word == "embedding_rowwise" and isinstance(module, nn.Embedding):
            part = vocab_part(module.num_embeddings, self._tp)
            weight = self._weights.tensor(f"{name}.weight", tuple(module.weight.shape), part=part)
            self._put(module, "weight", weight)
            self._filled[f"{name}.weight"] = (weight, word)
            self._replace(name, SplitEmbedding(module, part, self._tp))
            return
        if word in parallel.SUMMED:
            hook = SummedOutput(self._tp)
            self.parallel.append(hook)
            module.register_forward_hook(hook)
        elif word not in parallel.REPLICATED:
            raise ValueError(f"its plan has {word!r} for {name}, a {type(module).__name__}, which is not supported")
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            self._fill_parameter(f"{name}.{leaf}" if name else leaf, module, leaf, parameter)
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            if leaf not in module._non_persistent_buffers_set:
                full_name = f"{name}.{leaf}" if name else leaf
                dtype = torch.float32 if self._is_float32(full_name, buffer) else buffer.dtype
                module._buffers[leaf] = self._weights.tensor(full_name, tuple(buffer.shape), dtype=dtype)

    def _fill_parameter(self, name: str, module: nn.Module, leaf: str, parameter: Tensor) -> None:
        word = self._words.of(name) if self._tp.size > 1 else ""
        dtype = torch.float32 if self._is_float32(name, parameter) else parameter.dtype
        value = parallel.read_parameter(self._weights, name, tuple(parameter.shape), word, self._tp, dtype)
        self._put(module, leaf, value)
        self._filled[name] = (value, word)

    def _is_float32(self, name: str, parameter: Tensor) -> bool:
        """Whether a class keeps it in float32, whatever the model's dtype."""
        is_kept = self._float32 is not None and bool(self._float32.search(name))
        return parameter.dtype == torch.float32 or (is_kept and parameter.is_floating_point())

    def _put(self, module: nn.Module, leaf: str, value: Tensor) -> None:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def _replace(self, name: str, module: ParallelLinear | SplitEmbedding) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(parent), leaf, module)
        self.parallel.append(module)

    def _tied_weight(self, name: str, word: str) -> Tensor | None:
        """The weight of a module that it shares with one that was filled, where both hold the same part."""
        source = self._tied.get(f"{name}.weight")
        weight, how = self._filled.get(source or "", (None, ""))
        splits_rows = self._tp.size > 1 and word in parallel.GATHERED
        return weight if weight is not None and splits_rows == (how == "embedding_rowwise") else None

    def _make_buffers(self, module: nn.Module) -> None:
        """Computes the buffers that no checkpoint holds (rotary frequencies, say) as `transformers` does when it has
        loaded a model: by the class's `_init_weights`. What that leaves out is found by NaN."""
        own = module._non_persistent_buffers_set & module._buffers.keys()
        made = {leaf: buffer for leaf in own if (buffer := module._buffers[leaf]) is not None}
        for leaf, buffer in made.items():
            fill = float("nan") if buffer.is_floating_point() else 0
            module._buffers[leaf] = torch.full(buffer.shape, fill, dtype=buffer.dtype, device=self._device)
        if not made:
            return
        with torch.no_grad():
            owner = _owner(self._model, module)
            owner._init_weights(module)
        for leaf in made:
            value = module.get_buffer(leaf)
            if value.is_floating_point() and value.isnan().any():
                raise ConfigError(
                    f"{type(self._model).__name__} cannot be served through transformers: _init_weights does not "
                    f"compute the buffer {leaf!r} of {type(module).__name__}. Run it with transformers itself"
                )


def _float32_modules(model: Any) -> re.Pattern[str] | None:
    """Names of what a class keeps in float32: some in a model of any dtype, some only where it is float16."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if model.dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return re.compile(rf"(^|\.)({'|'.join(map(re.escape, sorted(kept)))})(\.|$)") if kept else None


def _owner(model: Any, module: nn.Module) -> Any:
    """The innermost pretrained model that contains `module`: its class knows how the module begins."""
    from transformers import PreTrainedModel

    found = model
    for candidate in model.modules():
        if isinstance(candidate, PreTrainedModel) and any(each is module for each in candidate.modules()):
            found = candidate
    return found


def _choose_experts(model: Any, tp: TensorParallel) -> None:
    """Mixtures of experts go expert by expert where a row of their weights is no multiple of 16 bytes: the grouped
    product that `transformers` prefers, torch's, does not take it."""
    stacked = (parameter for parameter in model.parameters() if parameter.dim() == 3)
    if any(size * each.itemsize % (16 * tp.size) for each in stacked for size in each.shape[1:]):
        with contextlib.suppress(ValueError):  # a model that has its own way alone
            model.set_experts_implementation("eager")


class _Words:
    """A tensor-parallel plan: the word for a module or a parameter, by patterns in which `*` is a layer's number."""

    def __init__(self, plan: Mapping[str, str]):
        self._plan = plan

    def of(self, name: str) -> str:
        """Empty where the plan has none: every rank holds the whole."""
        return self._plan.get(name) or self._plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name), "")


def load_decoder(
    model_path: str,
    spec: DecoderSpec,
    tp: TensorParallel,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str,
    seed: int,
    progress: LoadProgress | None = None,
    attention_backend: str = "auto",
    block_size: int = 64,
) -> tuple[TransformersDecoder, AttentionBackend]:
    """This rank's share of the model in a folder, tried with a few tokens; arguments are those of `load_model`.
    `ConfigError` says what cannot be read, or what the model does that cannot be served."""
    if tp.rank == 0:
        for line in spec.notes():
            log.info("%s", line)
    model = empty_model(spec, model_path, dtype)
    _choose_experts(model, tp)
    needs = attention_needs(spec, tp.size, block_size, dtype, device)
    backend = choose_backend(attention_groups(spec, tp.rank, tp.size), needs, attention_backend)
    weights: WeightSource = DummyWeights(seed, dtype, device)
    if load_format != "dummy":
        checkpoint = Checkpoint(model_path, load_format, progress)
        weights = CheckpointWeights(checkpoint, stored_parameters(model, checkpoint), dtype, device)
    parts = ModelParts(model, weights, tp, device)
    parts.fill()
    if isinstance(weights, CheckpointWeights) and tp.rank == 0:
        weights.report_unused()
    specs = [each for each in spec.attentions() if isinstance(each, GroupedAttentionSpec)]  # the only kind here
    groups = [ATTENTION_LAYERS[type(each)].group(each, tp.rank, tp.size) for each in specs]
    calls = attention.ModelAttention(spec.architecture, specs, groups, tp, backend)
    calls.bind(model)
    decoder = TransformersDecoder(spec, model, calls)
    probe(decoder, backend, calls, parts.parallel, tp, dtype, device)
    return decoder, backend
