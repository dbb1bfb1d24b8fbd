"""Any number of simulated runs: `python tests/simulation --seeds 100000 --first 0`. Prints each seed that fails."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulation.world import run_seed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many runs")
    parser.add_argument("--first", type=int, default=0, help="the first seed; to replay one, --seeds 1 --first SEED")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # each fault is one
    began, failed, num_steps, num_faults = time.perf_counter(), [], 0, 0
    for seed in range(args.first, args.first + args.seeds):
        try:
            world = run_seed(seed)
        except Exception:
            failed.append(seed)
            print(f"seed {seed} fails; replay it with --seeds 1 --first {seed}")
            traceback.print_exc()
        else:
            num_steps += world.num_steps
            num_faults += len(world.faults.log)
    elapsed_s = time.perf_counter() - began
    print(f"{args.seeds} seeds, {num_steps} steps, {num_faults} faults, {elapsed_s:.1f} s; failed: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
