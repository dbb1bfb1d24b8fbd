"""Stands in for the process that marks up: echoes, hangs or dies as it is asked."""

from __future__ import annotations

import json
import sys
import time

for line in sys.stdin.buffer:
    asked = json.loads(line)["code"]
    if asked == "hang":
        time.sleep(60)
    if asked == "die":
        raise SystemExit(1)
    sys.stdout.buffer.write(json.dumps(asked).encode() + b"\n")
    sys.stdout.buffer.flush()
