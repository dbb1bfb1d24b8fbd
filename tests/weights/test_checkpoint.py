"""Bad model folders are refused in one line that names the file; good ones are read slice by slice."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from teacher import load, log_probs
from tiny import make_checkpoint

from rayllm.distributed.groups import TensorParallel
from rayllm.errors import ConfigError
from rayllm.weights.checkpoint import Checkpoint
from rayllm.weights.checkpoint_weights import CheckpointWeights, find_stored, is_finite
from rayllm.weights.stored import Tensor
from rayllm.weights.stored_dtype import stored_dtype

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", tokenizer=False)


def _edit(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def _header(path: Path, header: object, num_bytes: int, header_len: int | None = None) -> None:
    text = json.dumps(header).encode()
    path.write_bytes((header_len or len(text)).to_bytes(8, "little") + text + bytes(num_bytes))


def _index(folder: Path, file_name: str) -> None:
    names = load_file(folder / SHARD)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file_name)}))


def _truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _tensor(dtype: str, shape: list[int], offsets: list[int]) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def _directory(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def _pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def _pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def _missing_tensor(folder: Path) -> None:
    _edit(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def _wrong_shape(folder: Path) -> None:
    _edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))


def _wrong_dtype(folder: Path) -> None:
    _edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))


def _not_a_number(folder: Path) -> None:
    _edit(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(5, float("nan")))


def _both_files(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "one.safetensors")
    (folder / "other.safetensors").write_bytes((folder / "one.safetensors").read_bytes())


def _foreign_index(folder: Path) -> None:
    _index(folder, SHARD)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["surprise"] = SHARD
    (folder / INDEX).write_text(json.dumps(index))


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights missing": (lambda folder: (folder / WEIGHTS).unlink(), r"contains neither model\.safetensors"),
    "weights truncated": (_truncate, r"model\.safetensors is not a readable"),
    "weights empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), r"model\.safetensors is not a readable"),
    "weights are a directory": (_directory, r"model\.safetensors is not a regular file"),
    "weights are a pipe": (_pipe, r"model\.safetensors is not a regular file"),
    "weights are a pickle": (_pickle_only, r"pytorch_model\.bin is not a readable PyTorch file"),
    "header past the end": (
        lambda folder: _header(folder / WEIGHTS, _tensor("F32", [2], [0, 8]), 8, 10**6),
        r"model\.safetensors is not a readable",
    ),
    "offsets reversed": (
        lambda folder: _header(folder / WEIGHTS, _tensor("F32", [1], [8, 4]), 12),
        r"model\.safetensors is not a readable",
    ),
    "shape overflows": (
        lambda folder: _header(folder / WEIGHTS, _tensor("F32", [2**40, 2**40], [0, 8]), 8),
        r"model\.safetensors is not a readable",
    ),
    "unknown dtype": (
        lambda folder: _header(folder / WEIGHTS, _tensor("F37", [2], [0, 8]), 8),
        r"model\.safetensors is not a readable",
    ),
    "tensor missing": (_missing_tensor, r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"),
    "tensor of a wrong shape": (_wrong_shape, r"model\.safetensors: tensor 'model\.norm\.weight' has shape \[63\]"),
    "tensor of a wrong dtype": (
        _wrong_dtype,
        r"has dtype torch\.int8: final_norm\.weight must be floating",
    ),
    "tensor with a NaN": (_not_a_number, r"tensor 'model\.norm\.weight' holds NaN or infinity"),
    "tensor in two files": (_both_files, r"is both in .*one\.safetensors and in other\.safetensors"),
    "index names a missing shard": (lambda folder: _index(folder, "gone.safetensors"), r"gone\.safetensors cannot be"),
    "index leaves the folder": (lambda folder: _index(folder, "../x.safetensors"), r"index\.json: .*same folder"),
    "index is absolute": (lambda folder: _index(folder, "/etc/passwd"), r"index\.json: weight_map names '/etc/passwd'"),
    "index names a pickle": (lambda folder: _index(folder, "evil.bin"), r"index\.json: .*must be a \.safetensors file"),
    "index is not JSON": (lambda folder: (folder / INDEX).write_text("{"), r"index\.json is not valid JSON"),
    "index is a list": (lambda folder: (folder / INDEX).write_text("[]"), r"index\.json must hold a JSON object"),
    "index without a map": (lambda folder: (folder / INDEX).write_text("{}"), r"index\.json: weight_map must be"),
    "index names a tensor that is not there": (_foreign_index, r"holds no tensor 'surprise'"),
}


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_a_bad_folder_is_refused_in_one_line_that_names_the_file(fault: str, folder: Path) -> None:
    damage, message = BAD_FOLDERS[fault]
    if fault.startswith("index"):  # beside a whole file it would not be read
        (folder / WEIGHTS).rename(folder / SHARD)
    damage(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        load(TensorParallel(), folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_missing_folder_names_the_nearest(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist; did you mean 'model'"):
        load(TensorParallel(), folder.parent / "modle")


def test_an_unexpected_tensor_is_named_in_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    _edit(folder, lambda tensors: tensors.update({"surprise": torch.ones(4)}))
    with caplog.at_level(logging.WARNING):
        load(TensorParallel(), folder)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: 1 tensors of the checkpoint are not used: surprise"
    ]


def test_every_tensor_of_a_checkpoint_is_used_and_derived_buffers_are_no_news(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    with caplog.at_level(logging.WARNING):
        load(TensorParallel(), folder)
    assert not caplog.records


def test_a_checkpoint_in_many_files_gives_the_same_model(folder: Path, tmp_path: Path) -> None:
    shards = make_checkpoint(tmp_path / "shards", tokenizer=False, max_shard_size="40KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    tokens = [[5, 9, 200, 31]]
    one, many = (log_probs(load(TensorParallel(), path), tokens, [4], 16)[0] for path in (folder, shards))
    assert torch.equal(one, many)


def _consolidated(folder: Path) -> None:
    """Another form of the same weights, with names of its own and some of the standard ones."""
    save_file(
        {"model.norm.weight": torch.zeros(64), "layers.0.wq": torch.zeros(2)}, folder / "consolidated.safetensors"
    )


def _stale_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))


STRAYS: dict[str, Callable[[Path], object]] = {
    "consolidated": _consolidated,
    "a copy": lambda folder: (folder / "copy.safetensors").write_bytes(b"no safetensors"),
    "pickle": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"no pickle"),
    "pickle's index": lambda folder: (folder / "pytorch_model.bin.index.json").write_text("{}"),
    "stale index": _stale_index,
}


@pytest.mark.parametrize("stray", STRAYS)
@pytest.mark.parametrize("form", ["whole", "shards with an index", "shards without an index"])
def test_files_beside_the_standard_ones_are_not_read(stray: str, form: str, folder: Path, tmp_path: Path) -> None:
    names = sorted(Checkpoint(folder).names())
    if form != "whole":
        folder = make_checkpoint(tmp_path / "shards", tokenizer=False, max_shard_size="40KB")
        if stray == "stale index" or form == "shards without an index":
            (folder / INDEX).unlink()
    if stray != "stale index" or form == "whole":
        STRAYS[stray](folder)
    found = Checkpoint(folder)
    assert sorted(found.names()) == names
    assert {found.file_of(name).name.partition("model")[0] for name in names} == {""}
    assert stored_dtype(folder) == "float32"


def test_a_bfloat16_checkpoint_is_served_in_float32(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, tokenizer=False, dtype=torch.bfloat16)
    model = load(TensorParallel(), path)
    assert model.decoder.spec.dtype == "bfloat16"
    found = log_probs(model, [[5, 9, 200, 31]], [4], 16)[0]
    assert found.dtype == torch.float32
    assert bool(found.isfinite().all())


def test_weights_too_large_for_the_dtype_are_refused(folder: Path) -> None:
    from rayllm.models import load_model
    from rayllm.models.registry import read_spec

    _edit(folder, lambda tensors: tensors["model.norm.weight"].mul_(1e6))
    with pytest.raises(ConfigError, match=r"holds NaN or infinity as torch\.float16"):
        load_model(str(folder), read_spec(folder), TensorParallel(), dtype=torch.float16, device=torch.device("cpu"))


def test_a_rank_reads_only_its_slices(tmp_path: Path) -> None:
    from rayllm.models import build_model
    from rayllm.models.registry import read_spec, weight_names

    path = make_checkpoint(tmp_path, tokenizer=False, num_hidden_layers=4)
    spec = read_spec(path)
    read = []
    for tp in (TensorParallel(), TensorParallel(0, 2), TensorParallel(1, 2)):
        checkpoint = Checkpoint(path)
        weights = CheckpointWeights(checkpoint, weight_names(spec), torch.float32, torch.device("cpu"))
        build_model(spec, weights, tp, torch.float32, torch.device("cpu"))
        read.append(checkpoint.bytes_read)
    whole, first, second = read
    norms = (2 * spec.num_layers + 1) * spec.hidden_size * 4
    assert whole == sum(tensor.nbytes for tensor in load_file(path / WEIGHTS).values())
    assert first == second == (whole - norms) // 2 + norms


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_a_rank_reads_only_its_part_of_the_experts(expert_parallel: bool, tmp_path: Path) -> None:
    from mixtures import SIZES, make_mixture
    from transformers import MixtralConfig

    from rayllm.models import build_model
    from rayllm.models.registry import read_spec, weight_names

    path = make_mixture(tmp_path, MixtralConfig(**SIZES, intermediate_size=96, num_local_experts=8))
    spec = read_spec(path)
    read = []
    for rank in range(2):
        checkpoint = Checkpoint(path)
        weights = CheckpointWeights(checkpoint, weight_names(spec), torch.float32, torch.device("cpu"))
        tp = TensorParallel(rank, 2, expert_parallel=expert_parallel)
        build_model(spec, weights, tp, torch.float32, torch.device("cpu"))
        assert not checkpoint.unused()
        read.append(checkpoint.bytes_read)
    whole = sum(tensor.nbytes for tensor in load_file(path / WEIGHTS).values())
    replicated = ((2 * spec.num_layers + 1) * spec.hidden_size + spec.num_layers * 8 * spec.hidden_size) * 4
    assert read == [(whole - replicated) // 2 + replicated] * 2


def test_names_map_layers_and_modules_to_the_checkpoints_own() -> None:
    names = {"embedding": "model.embed_tokens", "layers.q": "model.layers.{}.self_attn.q_proj"}
    assert find_stored("embedding.weight", names) == Tensor("model.embed_tokens.weight")
    assert find_stored("layers.12.q.bias", names) == Tensor("model.layers.12.self_attn.q_proj.bias")


def test_a_sum_that_is_too_large_is_no_infinity() -> None:
    assert is_finite(torch.full((4,), 60000.0, dtype=torch.float16))
    assert is_finite(torch.empty(0))
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not is_finite(torch.tensor([1.0, bad, 2.0]))
    assert not is_finite(torch.tensor([float("inf"), -float("inf")], dtype=torch.bfloat16))
