"""`rayllm status`: what a running server does now: health, load, KV, pace, faults, ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rayllm.cli.addresses import server_url
from rayllm.cli.flags import Parser, UsageError
from rayllm.cli.serve import python_line

if TYPE_CHECKING:
    from rayllm.machine.registry import Entry

_INTERVAL_S = 1.0


def parser() -> Parser:
    made = Parser(
        prog="rayllm status", description="Tell show a server's state: load, KV use, tokens/s, faults, ranks."
    )
    made.add_argument(
        "server", metavar="NAME|PID|PORT|URL", nargs="?", help="the server (default: the only local server)"
    )
    made.add_argument("--api-key", help="API key to send (default: RLLM_API_KEY)")
    made.add_argument(
        "--interval", type=float, metavar="S", help=f"seconds to measure token rates over (default: {_INTERVAL_S:g})"
    )
    made.add_argument("--json", action="store_true", help="print one line of JSON")
    return made


def run(argv: Sequence[str]) -> int:
    """0 for a healthy server, 1 for one that is not, 3 where none answers."""
    given = parser().parse(argv)
    interval_s = given.get("interval", _INTERVAL_S)
    if interval_s < 0:
        raise UsageError(f"--interval {interval_s:g} must be 0 seconds or more")

    from rayllm.cli.client import ApiClient
    from rayllm.config import Environment

    url, entry = _server(given.get("server"))
    with ApiClient(url, given.get("api_key") or Environment.api_key(), timeout_s=10.0) as client:
        found = look(client, interval_s)
    if entry is not None:
        found |= {"name": entry.name, "pid": entry.pid, "ray_address": entry.ray_address, "log": entry.log}
    print(json.dumps(found) if given.get("json") else _as_text(found))
    return 0 if found["healthy"] else 1


def _server(word: str | None) -> tuple[str, Entry | None]:
    """The address to ask, and what is known of the server where it is one of this machine."""
    from rayllm.machine.registry import find_at

    url = server_url(word)
    return url, find_at(url)


def look(client: Any, interval_s: float) -> dict[str, Any]:
    """What the server tells of itself, with rates over `interval_s`. `EngineUnreachableError` where none answers."""
    health = client.get("/health")
    stage = client.stage()
    found: dict[str, Any] = {"url": client.url, "healthy": health.is_success, "stage": stage}
    if stage == "not reachable" or not health.is_success:
        return found
    found["model"] = client.model()
    first, began = _read_metrics(client), time.monotonic()
    if interval_s:
        time.sleep(interval_s)
    last, elapsed_s = _read_metrics(client), time.monotonic() - began
    found |= {name: last.get(metric) for name, metric in _GAUGES.items()}
    for name, metric in _RATES.items():
        if metric in last and interval_s:
            found[name] = round((last[metric] - first.get(metric, 0.0)) / elapsed_s, 2)
    state = client.get("/dashboard/state")
    found["processes"] = state.json().get("processes", []) if state.is_success else []
    return found


_GAUGES = {
    "num_running": "vllm:num_requests_running",
    "num_waiting": "vllm:num_requests_waiting",
    "kv_cache_usage": "vllm:kv_cache_usage_perc",
    "num_preemptions": "vllm:num_preemptions_total",
    "num_faults": "rayllm:worker_faults_total",
    "num_driver_losses": "rayllm:driver_losses_total",
    "num_replays": "rayllm:sequences_replayed_total",
    "num_generation_tokens": "vllm:generation_tokens_total",
}
_RATES = {
    "prompt_tokens_per_second": "vllm:prompt_tokens_total",
    "generation_tokens_per_second": "vllm:generation_tokens_total",
}


def _read_metrics(client: Any) -> dict[str, float]:
    """The samples of `/metrics`, each summed over its labels; empty where a server has none."""
    from prometheus_client.parser import text_string_to_metric_families

    answer = client.get_checked("/metrics")
    stats: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            stats[sample.name] = stats.get(sample.name, 0.0) + sample.value
    return stats


def _as_text(found: Mapping[str, Any]) -> str:
    rows = [("server", found["url"]), ("state", found["stage"])]
    if "name" in found:
        rows += [("name", f"{found['name']} (pid {found['pid']})"), ("log", found["log"])]
    if found.get("ray_address"):
        rows += [("Ray", found["ray_address"]), ("from Python", python_line(found["name"]))]
    if found["healthy"]:
        rows += [
            ("model", found["model"]),
            ("requests", f"{_count(found, 'num_running')} running, {_count(found, 'num_waiting')} waiting"),
            ("KV cache", "unknown" if found["kv_cache_usage"] is None else f"{found['kv_cache_usage']:.1%} in use"),
            ("pace", f"{_count(found, 'generation_tokens_per_second', 1)} tokens/s out, "
                     f"{_count(found, 'prompt_tokens_per_second', 1)} in"),
            ("preemptions", _count(found, "num_preemptions")),
            ("faults", f"{_count(found, 'num_faults')} of workers, {_count(found, 'num_driver_losses')} of drivers; "
                       f"{_count(found, 'num_replays')} sequences replayed"),
        ]  # fmt: skip
        for process in found["processes"]:
            role = process["role"] if process.get("rank") is None else f"rank {process['rank']}"
            devices = f" on {', '.join(process['devices'])}" if process.get("devices") else ""
            rows.append((role, f"pid {process['pid']} at {process['host']}{devices}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _count(found: Mapping[str, Any], name: str, digits: int = 0) -> str:
    value = found.get(name)
    return "?" if value is None else f"{value:,.{digits}f}"
