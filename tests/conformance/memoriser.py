"""A small model that knows the prompts of one client's tests by heart.

LangChain's tests judge what a model says. So the tests run once against a teacher, which answers by the rules below
through our own API; each prompt, as the API rendered it, and its answer are what the built-in model is then trained
on, once. The trained model answers the same tests on a real server.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from api.fake_engine import FakeEngine, config
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import LlamaForCausalLM

from rayllm.api.service import ModelService
from rayllm.config import ModelShape
from rayllm.demo import model_path
from rayllm.request import Request, unpack_ids
from rayllm.serve.app import create_app
from rayllm.text.tokenizer import Tokenizer

_MAX_EPOCHS = 120
_BATCH_TOKENS = 2000
_LEARNING_RATE = 6e-4
_GOOD_LOSS = 0.005
"""Mean cross-entropy a token at which greedy answers are the learned ones with much to spare."""
_GOOD_MARGIN = 1.0
"""In nats: more than rounding and the shape of a batch can change."""
_IGNORED = -100

Lesson = tuple[bytes, list[int]]
"""Ids of a prompt, packed, and those of its answer. Letters of shapes: B lessons, T tokens, H width, V vocabulary, A
tokens of answers."""
Ask = Callable[[str], None]
"""Runs the client's tests against the server at a URL; whether they pass does not matter."""


def make_memoriser(models: Path, ask: Ask, name: str, api_key: str) -> Path:
    """Returns the checkpoint's folder, in `models`; it is made where there is none for what the client asks now."""
    tokenizer = Tokenizer.from_path(str(model_path()))
    with _teacher(tokenizer, name, api_key) as (url, taught):
        ask(url)
    lessons = sorted(taught.items())
    made_of = (repr(lessons).encode(), (model_path() / "model.safetensors").read_bytes(), Path(__file__).read_bytes())
    folder = models / f"memoriser-{hashlib.sha256(b''.join(made_of)).hexdigest()[:8]}"
    if not (folder / "made").exists():
        shutil.copytree(model_path(), folder, dirs_exist_ok=True)
        _learn(folder, lessons)
        (folder / "made").touch()
    return folder


# -------------------------------------------------------------------------------------------------------- teacher


@contextmanager
def _teacher(tokenizer: Tokenizer, name: str, api_key: str) -> Iterator[tuple[str, dict[bytes, list[int]]]]:
    """Our app with an engine that answers by rule; (its URL, prompt ids -> answer ids as they come)."""
    lessons: dict[bytes, list[int]] = {}
    end_id = tokenizer.eos_token_id
    assert end_id is not None

    def say(request: Request, choice: int) -> Sequence[int]:
        answer = _answer(tokenizer.decode(list(request.prompt_token_ids), False), request)
        lessons[request.prompt] = [*tokenizer.encode(answer), end_id]
        return lessons[request.prompt]

    service = ModelService()
    shape = ModelShape(vocab_size=2048, eos_token_ids=(end_id,), num_layers=4)
    service.set_ready(config(shape=shape, max_model_len=2048, served_model_name=name), tokenizer, FakeEngine(say))
    app = create_app(service, api_keys=(api_key,))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", lessons
    finally:
        server.should_exit = True
        thread.join()


_JOKE = {"setup": "Why do cats purr?", "punchline": "They run on a small engine."}
_RULES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("magic_function_no_args", "magic_function_no_args", {}),
    ("magic_function", "magic_function", {"input": 3}),
    ("Pirate", "greeting_generator", {"answer_style": "Pirate"}),
    ("weather", "get_weather", {"location": "San Francisco, CA"}),
    ("Hello!", "magic_function", {"input": 3}),
    ("你好", "unicode_customer", {"customer_name": "你好啊集团", "description": "a technology company"}),
    ("こんにちは", "unicode_customer", {"customer_name": "こんにちは株式会社", "description": "a company"}),
    ("What is 3 + 4", "my_adder_tool", {"a": 3, "b": 4}),
)
"""(sign in the user's last message, tool, arguments)."""
_LAST_USER = re.compile(r".*<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)
_TOOL_NAME = re.compile(r'"name": "(\w+)"')


def _answer(prompt: str, request: Request) -> str:
    found = _LAST_USER.match(prompt)
    asked = found.group(1) if found else ""
    tools = set(_TOOL_NAME.findall(prompt)) - {"NAME"}  # so the system prompt calls any tool
    for sign, tool, arguments in _RULES:
        if tools and sign in asked and tool in tools:
            return (
                f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
            )
    if "joke" in asked:
        joke = {"setup": _JOKE["setup"]} if "no punchline" in asked else _JOKE
        if tools:
            [tool] = tools
            return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': joke})}\n</tool_call>"
        return json.dumps(joke)
    return "Hello! I am a small model, and well."


# ------------------------------------------------------------------------------------------------------- training


def _learn(folder: Path, lessons: Sequence[Lesson]) -> None:
    """Trains the checkpoint until it says every answer. The same lessons give the same weights, on one machine with one
    number of threads. `SystemExit` where it does not know them by heart."""
    assert lessons, "the client asked nothing"
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batches = [_rows(batch) for batch in _batches(lessons)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    began_s, num_epochs, loss = time.process_time(), 0, float("inf")
    while loss > _GOOD_LOSS and num_epochs < _MAX_EPOCHS:
        num_epochs += 1
        loss = max(_step(model, optimizer, *batch) for batch in batches)
        if num_epochs % 5 == 0:
            print(f"memoriser: epoch {num_epochs}, loss {loss:.4f}", flush=True)
    _store(model, folder)
    margins = [margin for batch in batches for margin in _margins(folder, *batch)]
    print(
        f"memoriser: {len(lessons)} lessons, loss {loss:.4f} after {num_epochs} epochs and "
        f"{time.process_time() - began_s:.0f} s of CPU; the right next token leads by {min(margins):.1f} nats or more",
        flush=True,
    )
    if num_unsure := sum(margin < _GOOD_MARGIN for margin in margins):
        raise SystemExit(f"memoriser: {num_unsure} of {len(lessons)} answers were not learned")


def _step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, tokens_BT: torch.Tensor, targets_BT: torch.Tensor
) -> float:
    """One update; returns the loss before it."""
    states_BTH = model.model(input_ids=tokens_BT, use_cache=False).last_hidden_state
    rows_A, positions_A = torch.nonzero(targets_BT[:, 1:] != _IGNORED, as_tuple=True)
    logits_AV = model.lm_head(states_BTH[rows_A, positions_A])
    loss = functional.cross_entropy(logits_AV, targets_BT[rows_A, positions_A + 1])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _store(model: LlamaForCausalLM, folder: Path) -> None:
    """In the data types of the checkpoint that was there."""
    file = folder / "model.safetensors"
    stored, trained = load_file(file), model.state_dict()
    save_file({key: trained[key].to(old.dtype).contiguous() for key, old in stored.items()}, file, {"format": "pt"})


@torch.inference_mode()
def _margins(folder: Path, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> list[float]:
    """By lesson: how far above all others, in nats, the stored model sees the answer's next token where it is closest;
    negative where a greedy answer is another."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    margins = []
    for tokens_T, targets_T in zip(tokens_BT, targets_BT):
        [positions_A] = torch.nonzero(targets_T != _IGNORED, as_tuple=True)
        logits_AV = model(input_ids=tokens_T[None], use_cache=False).logits[0, positions_A - 1]
        ids_A1 = targets_T[positions_A, None]
        wanted_A1 = logits_AV.gather(1, ids_A1)
        margins.append(float((wanted_A1 - logits_AV.scatter(1, ids_A1, -torch.inf)).amin()))
    return margins


def _batches(lessons: Sequence[Lesson]) -> list[list[Lesson]]:
    """Lessons of like length together, so that little of a batch is padding."""
    batches: list[list[Lesson]] = [[]]
    for lesson in sorted(lessons, key=lambda lesson: (len(lesson[0]), lesson)):
        if (len(batches[-1]) + 1) * len(lesson[0]) // 4 > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(lesson)
    return batches


def _rows(lessons: Sequence[Lesson]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded on the right, and what is to be predicted of them: the answers."""
    pairs = [(list(unpack_ids(prompt)), answer) for prompt, answer in lessons]
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    tokens_BT = torch.zeros((len(pairs), width), dtype=torch.int64)
    targets_BT = torch.full((len(pairs), width), _IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        tokens_BT[row, :end] = torch.tensor([*prompt, *answer])
        targets_BT[row, len(prompt) : end] = torch.tensor(answer)
    return tokens_BT, targets_BT
