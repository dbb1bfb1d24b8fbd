"""Random faults over a mixed load, for as long as asked: `python tests/chaos --minutes 60 --seed 0`.

Each round runs the whole load and, meanwhile, kills, stops or stops and continues ranks, the driver, or two of them one
after the other; then every answer must be the undisturbed one's and nothing of the load be left. What round n of seed s
does is what round 0 of seed s + n does, so that a failing one is run again by its own seed. (Not to the token: the
moment of a fault is, its place in a step is the machine's.)

With `--nodes` it is a server in a Ray of several nodes, and the node with the engine is removed or frozen.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chaos.lost_nodes import soak_nodes
from chaos.mixed_load import Engine, kill, moment_of, stop_for_a_while
from tiny import make_checkpoint

from rayllm.engine.owner.owner import RestartBudget
from rayllm.executor.ray_cluster import connected_ray

KINDS = ("kill a rank", "stop a rank", "stop and continue", "kill the driver", "two ranks", "driver while recovering")


def fault_of(kind: str, engine: Engine, rng: random.Random, waiting: list[threading.Thread]) -> Callable[[], None]:
    """What to do at the moment; threads that it leaves are added to `waiting`."""
    driver, ranks = engine.pids()
    victim, other = rng.sample(ranks, 2)
    delay_s = rng.uniform(0, 1.5)

    def later(pid: int) -> None:
        waiting.append(engine.when_recovering(partial(kill, pid), delay_s))
        kill(victim)

    return {
        "kill a rank": partial(kill, victim),
        "stop a rank": partial(kill, victim, signal.SIGSTOP),
        "stop and continue": lambda: waiting.append(stop_for_a_while(victim, delay_s)),
        "kill the driver": partial(kill, driver),
        "two ranks": partial(later, other),
        "driver while recovering": partial(later, driver),
    }[kind]


def soak(engine: Engine, minutes: float, seed: int) -> int:
    """Rounds until the time is up; returns how many. Raises what a failing one raises, after it said its seed."""
    undisturbed = engine.run()
    engine.owned._restarts = RestartBudget(max_quick_failures=10**9)
    began, num_rounds, num_faults = time.monotonic(), 0, 0
    while time.monotonic() - began < 60 * minutes:
        rng = random.Random(seed + num_rounds)
        kind, waiting = rng.choice(KINDS), list[threading.Thread]()
        moment, started = moment_of(undisturbed, rng), time.monotonic()
        try:
            stats = engine.check(undisturbed, moment, fault_of(kind, engine, rng, waiting))
        except BaseException:
            print(f"round {num_rounds} fails ({kind} after {moment} tokens); again: --seed {seed + num_rounds}")
            raise
        for thread in waiting:
            thread.join()
        num_rounds += 1
        num_faults += 1 + (kind in KINDS[-2:])
        stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stats.recovery_s.items() if seconds >= 0.01)
        print(
            f"{time.monotonic() - began:6.0f} s  round {num_rounds}: {kind} after {moment} tokens, "
            f"{time.monotonic() - started:.1f} s; {stages}",
            flush=True,
        )
    print(f"{num_rounds} rounds, {num_faults} faults: every answer as without them, nothing left behind")
    return num_rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--standby", choices=["off", "process", "weights"], default="process")
    parser.add_argument("--nodes", action="store_true", help="lose nodes of a cluster instead of processes")
    options = parser.parse_args()
    if options.nodes:
        with tempfile.TemporaryDirectory() as folder:
            soak_nodes(make_checkpoint(Path(folder) / "tiny"), options.minutes, options.seed)
        return 0
    with tempfile.TemporaryDirectory() as folder, connected_ray(num_cpus=8):
        engine = Engine(make_checkpoint(Path(folder) / "model"), options.standby)
        try:
            soak(engine, options.minutes, options.seed)
        except Exception:
            traceback.print_exc()
            with contextlib.suppress(Exception):
                engine.close()
            return 1
        engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
