"""Engines of two names in one Ray: a script that finds the server by its address, a trainer actor of another job and
HTTP clients use them at once, each with the answers of a solo run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from served_process import running_serve

from rayllm import LLM, SamplingParams

pytestmark = [pytest.mark.cluster, pytest.mark.live, pytest.mark.timeout(240)]

PROMPTS = ["Once upon a time", "The driver plans tokens", "Hello"]
FIELDS: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
JOB = """
import json, sys
import ray
import rayllm
from rayllm import LLM, SamplingParams

url, model, prompts, fields = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
params = SamplingParams(**fields)

def texts(engine):
    return [engine.generate(prompt, params).result().outputs[0].text for prompt in prompts]

@ray.remote(num_cpus=0)
class Trainer:
    def roll_out(self, name):
        return texts(rayllm.get_engine(name))

if __name__ == "__main__":
    first = rayllm.connect(url)
    settings = {"distributed_executor_backend": "ray", "device": "cpu", "max_model_len": 256, "num_kv_blocks": 200}
    with LLM(model, name="second", **settings) as second:
        trainer = Trainer.remote()
        rolled = [trainer.roll_out.remote(name) for name in ("first", "second")]
        own = [output.outputs[0].text for output in second.generate(prompts, params, use_tqdm=False)]
        found = {"connect": texts(first), "second": own}
        found |= dict(zip(("trainer first", "trainer second"), ray.get(rolled)))
    print(json.dumps(found), flush=True)
    first.close().result()
"""


def test_two_engines_serve_a_script_a_trainer_and_http_clients_at_once(llama_path: Path) -> None:
    with LLM(str(llama_path), device="cpu", max_model_len=256, num_kv_blocks=200) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(**FIELDS), use_tqdm=False)
        expected = [output.outputs[0].text for output in outputs]
    flags = ("--name", "first", "--served-model-name", "tiny", "--max-model-len", "256", "--num-kv-blocks", "200")
    with running_serve(str(llama_path), *flags) as served:
        arguments = [served.url, str(llama_path), json.dumps(PROMPTS), json.dumps(FIELDS)]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        job = subprocess.Popen(
            [sys.executable, "-c", JOB, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        answers: list[list[str]] = []
        over = threading.Event()

        def ask() -> None:
            while not over.is_set():
                bodies = [{"model": "tiny", "prompt": prompt, **FIELDS} for prompt in PROMPTS]
                replies = [served.client.post("/v1/completions", json=body).json() for body in bodies]
                answers.append([reply["choices"][0]["text"] for reply in replies])

        clients = [threading.Thread(target=ask) for _ in range(2)]
        for client in clients:
            client.start()
        said, errors = job.communicate(timeout=150)
        over.set()
        for client in clients:
            client.join(60)
        assert job.returncode == 0, errors.decode(errors="replace")[-3000:]
        found = json.loads(said.splitlines()[-1])
        assert found == dict.fromkeys(("connect", "second", "trainer first", "trainer second"), expected)
        assert len(answers) > 1
        assert all(answer == expected for answer in answers)
        assert served.client.get("/health").status_code == 200
