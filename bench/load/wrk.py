"""wrk, a load generator in C, for the peak: a Python client costs as much CPU as the server.

wrk is a closed loop, so its latencies leave out the wait of a fixed schedule; only its rate counts.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardline.bench.load.stats import Figures
from shardline.shards.core.errors import Unavailable

PROGRAM = "wrk"
GRACE_S = 30.0
WHAT = ("requests", "seconds", "connect", "read", "write", "timeout", "status")
PERCENTILES = ("p50", "p90", "p99", "p99_9", "max")
# Requests come ready made from a file: a length of four bytes, big end first, before each.
SCRIPT = """
local requests, at = {}, 0
function init(args)
  local file = assert(io.open(args[1], "rb"))
  while true do
    local size = file:read(4)
    if not size then break end
    local a, b, c, d = size:byte(1, 4)
    requests[#requests + 1] = file:read(((a * 256 + b) * 256 + c) * 256 + d)
  end
  file:close()
  at = tonumber(args[2]) % #requests
end
function request() at = at % #requests + 1; return requests[at] end
function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    "\\nRESULT [%d,%f,%d,%d,%d,%d,%d,%f,%f,%f,%f,%f]\\n", summary.requests, summary.duration / 1e6,
    e.connect, e.read, e.write, e.timeout, e.status, latency:percentile(50) / 1e3,
    latency:percentile(90) / 1e3, latency:percentile(99) / 1e3, latency:percentile(99.9) / 1e3,
    latency.max / 1e3))
end
"""


def find_wrk() -> str | None:
    """Where wrk is, if it is installed."""
    return shutil.which(PROGRAM)


def run_wrk(
    program: str,
    url: str,
    messages: Sequence[bytes],
    *,
    connections: int,
    seconds: float,
    first: int = 0,
) -> Figures:
    """Whole HTTP requests over ``connections`` by one thread, for whole seconds: in order from
    number ``first`` on, starting over when all were sent.

    Raises:
        Unavailable: wrk failed; carries its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        script, requests = Path(folder, "requests.lua"), Path(folder, "requests.bin")
        script.write_text(SCRIPT)
        requests.write_bytes(b"".join(len(m).to_bytes(4, "big") + m for m in messages))
        duration = max(round(seconds), 1)
        command = [program, "-t1", f"-c{connections}", f"-d{duration}s", "-s", str(script), url]
        done = subprocess.run(
            [*command, "--", str(requests), str(first)],
            capture_output=True,
            text=True,
            timeout=duration + GRACE_S,
            check=False,
        )
    result = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not result:
        text = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise Unavailable("wrk did not run", got=text.splitlines()[-1])
    return figures_of(json.loads(result[0].removeprefix("RESULT ")))


def figures_of(values: list[Any]) -> Figures:
    """``values`` as the script prints them. wrk does not tell 429 from other refusals."""
    named = dict(zip((*WHAT, *PERCENTILES), values, strict=True))
    failures = {
        f"wrk: {kind}": int(named[kind])
        for kind in ("connect", "read", "write", "timeout", "status")
        if named[kind]
    }
    answered = int(named["requests"]) - int(named["status"])
    rate = round(answered / named["seconds"], 3)
    return Figures(
        sent=answered + sum(failures.values()),
        answered=answered,
        rejected=0,
        failed=sum(failures.values()),
        failures=failures,
        offered_rate=rate,
        goodput=rate,
        qps=rate,
        p50_ms=named["p50"],
        p90_ms=named["p90"],
        p99_ms=named["p99"],
        p99_9_ms=named["p99_9"],
        max_ms=named["max"],
        coverage_min=None,
        coverage_mean=None,
        partial=0,
    )
