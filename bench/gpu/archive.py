"""``make gpu-check``: one archive with the check, the modules that it imports, and the pins.

python -m shardline.bench.gpu.archive [FILE]
"""

import argparse
import ast
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START = "shardline.bench.gpu_check"
FOLDER = "gpu-check"
# the double, so that --fake runs there too, and the pinned versions
ALSO = ("tests/__init__.py", "tests/fake_gpu_faiss.py", "constraints-gpu.txt", "LICENSE")
PACKAGES = "faiss-gpu torch numpy"


def modules(start: str = START) -> dict[str, Path]:
    """Dotted name -> file of ``start`` and of every module of ours that it imports, directly or
    not, with their packages."""
    found: dict[str, Path] = {}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        path = _file_of(name)
        if path is None or name in found:
            continue
        found[name] = path
        waiting += list(_imported(path))
        waiting += [name.rpartition(".")[0]]
    return found


def _file_of(name: str) -> Path | None:
    """The file of a module or package of ours; None for anything else, names in modules too."""
    if name.partition(".")[0] != "shardline":
        return None
    place = ROOT / name.replace(".", "/")
    for path in (place / "__init__.py", place.with_suffix(".py")):
        if path.exists():
            return path
    return None


def _imported(path: Path) -> Iterator[str]:
    """What a module imports when it is imported: not within functions, not for type checkers."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def write(target: Path) -> list[str]:
    """Writes the archive; the names in it, sorted. Links of the checkout become plain files."""
    names = {f"{FOLDER}/{path.relative_to(ROOT)}": path for path in modules().values()}
    names |= {f"{FOLDER}/{name}": ROOT / name for name in ALSO}
    temporary = target.with_suffix(".part")
    with tarfile.open(temporary, "w:gz", dereference=True) as archive:
        for name, path in sorted(names.items()):
            archive.add(path, name)
    temporary.rename(target)
    return sorted(names)


def commands(target: Path) -> list[str]:
    """What to run on the machine with the card."""
    return [
        f"tar xzf {target.name} && python3 -m pip install --constraint "
        f"{FOLDER}/constraints-gpu.txt {PACKAGES}",
        f"cd {FOLDER} && python3 -m {START} --minutes 9 --out results",
    ]


def main() -> None:
    """Writes the archive and prints the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, default=Path(f"{FOLDER}.tgz"))
    target: Path = parser.parse_args().file
    count = len(write(target))
    lines = [
        f"{target}: {count} files, {target.stat().st_size / 1024:.0f} KiB. Carry it to a machine "
        "with a card (Linux, Python 3.11 or newer, a driver for CUDA 13), then there:",
        *(f"  {line}" for line in commands(target)),
        "Results: results/gpu-check.json and the table. The same command again goes on with what",
        "is missing. docs/GPU.md says how to read them.",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
