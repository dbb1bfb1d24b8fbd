from __future__ import annotations

from models.architectures.test_llama import CONFIG

from rayllm.models.architectures import qwen3
from rayllm.spec import NormSpec


def test_heads_have_a_norm_and_a_width_of_their_own() -> None:
    attention = qwen3.spec(CONFIG).layers[0].attention
    assert attention.qk_norm == NormSpec("rms", 1e-5)
    assert (attention.head_dim, attention.scale) == (128, 128**-0.5)
    assert qwen3.spec({**CONFIG, "head_dim": 32}).layers[0].attention.head_dim == 32


def test_windows_are_those_of_qwen2() -> None:
    fields = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
    assert [layer.attention.window for layer in qwen3.spec({**CONFIG, **fields}).layers] == [None, None, 5]
