"""Small tokenizers of the two kinds that decoders use: bytes as characters, and pieces with byte fallback."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, processors

START, END = "<s>", "</s>"


def make_sentencepiece_tokenizer(folder: Path) -> Path:
    """Like Llama 2's: spaces are `▁`, unknown characters fall back to `<0x..>` tokens."""
    words = ["▁hello", "▁world", "hello", "world", "▁", *"abcdefghijklmnopqrstuvwxyz.,!", "中"]
    pieces = ["<unk>", START, END, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = []
    for word in ("▁hello", "hello", "▁world", "world"):
        for i in range(1, len(word)):
            if word[: i + 1] not in pieces:
                pieces.append(word[: i + 1])
            if (word[:i], word[i]) not in merges:
                merges.append((word[:i], word[i]))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    pipeline = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    pipeline.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pipeline.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, vocab[START])]
    )
    pipeline.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    pipeline.add_special_tokens(["<unk>", START, END])
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START,
        "eos_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def make_sentencepiece_model(
    folder: Path, *, vocab_size: int = 320, model_type: str = "bpe", user_defined_symbols: str = ""
) -> Path:
    """A folder with a `tokenizer.model` alone, as Llama 2 and Vicuna bring it, trained on the spot."""
    import io

    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    lines = ["hello world, how are you today?", "the answer to the question is 42.", "una frase más, y otra línea"] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=vocab_size,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=user_defined_symbols,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def make_ranks(folder: Path, num_merged: int = 80) -> Path:
    """A folder with a `tokenizer.model` of lines "base64 rank" alone, as GLM-4 brings it: all bytes, then what is
    merged most often in a few lines of text."""
    import base64

    from tokenizers import models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + num_merged, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator(["hello world, how are you today?", "你好，世界", "get_weather 1234"] * 9, trainer)
    table = {character: i for i, character in enumerate(_byte_characters())}
    by_rank = sorted(trained.get_vocab().items(), key=lambda entry: entry[1])
    tokens = [bytes(table[character] for character in written) for written, _ in by_rank]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [base64.b64encode(token).decode() + f" {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_text("".join(lines))
    return folder


def _byte_characters() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [bytes_to_unicode()[byte] for byte in range(256)]
