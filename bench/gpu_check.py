"""``make gpu-check`` packs it, a machine with a card runs it: what the GPU path does and costs.

Needs torch, numpy and one of faiss's GPU wheels; no Ray, no network. Each part is a process and a
JSON file, the most valuable first, within ``--minutes``; started again it goes on with what is
missing. ``--fake`` runs everything in tiny sizes without a card. docs/GPU.md says how to read it.

    python -m shardline.bench.gpu_check [--minutes 9] [--out FOLDER] [--parts A,B] [--fake]
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from shardline.bench.gpu.check_run import NAMES, chosen_parts, passed, run
from shardline.bench.gpu.check_table import FAKE_LINE, report
from shardline.bench.gpu.part_outcome import as_json, write_json
from shardline.shards.core.errors import InvalidInput, ShardlineError

PASSED, FAILED, REFUSED, STOPPED = 0, 1, 2, 130  # exit codes
MOST_MINUTES = 600
JSON_NAME = "gpu-check.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check; 0: what ran is as expected, 1: something is not, 2: nothing was begun."""
    options = _parser().parse_args(arguments)
    if options.fake:
        _say(FAKE_LINE)
    try:
        if not 0 < options.minutes <= MOST_MINUTES:
            raise InvalidInput(
                "no such budget",
                field="--minutes",
                expected=f"above 0 and at most {MOST_MINUTES}",
                got=str(options.minutes),
            )
        parts = chosen_parts(options.parts.split(",") if options.parts else NAMES)
        setup, outcomes = run(
            options.out,
            parts,
            minutes=options.minutes,
            fake=options.fake,
            fresh=options.fresh,
            say=_say,
        )
    except ShardlineError as error:
        sys.stderr.write(f"gpu-check: {error}\n")
        return REFUSED
    except KeyboardInterrupt:
        sys.stderr.write("gpu-check: stopped; the same command goes on with what is missing\n")
        return STOPPED
    content = {
        "fake": options.fake,
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "setup": setup,
        "parts": [as_json(outcome) for outcome in outcomes],
    }
    write_json(options.out / JSON_NAME, content)
    _say("")
    for line in report(setup, outcomes):
        _say(line)
    _say(f"figures: {options.out / JSON_NAME}")
    if not outcomes[0].is_complete:
        return REFUSED
    return PASSED if passed(outcomes) else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="budget of all parts (9)")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of results")
    parser.add_argument("--parts", default="", help=f"some of {','.join(NAMES)}")
    parser.add_argument("--fake", action="store_true", help="tiny sizes, without a card")
    parser.add_argument("--fresh", action="store_true", help="forget results in --out")
    return parser


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
