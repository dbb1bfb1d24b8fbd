from __future__ import annotations

from fakes import fake_config

from rayllm.executor.worker_process import last_error, worker_environment


def test_workers_of_one_node_talk_over_loopback_with_their_own_threads() -> None:
    config = fake_config(num_threads=3)
    assert worker_environment(config, single_node=True) == {
        "OMP_NUM_THREADS": "3",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    assert worker_environment(config, single_node=False) == {"OMP_NUM_THREADS": "3"}


def test_on_gpus_torchs_watchdog_must_not_end_survivors_and_no_library_may_start_cuda() -> None:
    assert worker_environment(fake_config(device="cuda", num_threads=3), single_node=False) == {
        "OMP_NUM_THREADS": "3",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }


def test_the_last_error_of_a_log_is_one_line_without_traceback_or_path() -> None:
    log = """starting
Traceback (most recent call last):
  File "/usr/lib/x.py", line 3, in load
    raise MemoryError
torch.OutOfMemoryError: CUDA out of memory while reading /models/q/model.safetensors
"""
    assert last_error(log) == "torch.OutOfMemoryError: CUDA out of memory while reading model.safetensors"
    assert last_error("all is well\n") == "all is well"
    assert last_error(":job_id:01000000\n:actor_name:WorkerActor\n") == last_error("") == ""
