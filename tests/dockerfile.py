"""Reads a Dockerfile; carries its steps out in a folder that holds a bare Debian, without Docker.

    debootstrap --variant=minbase bookworm ROOT && python -m tests.dockerfile ROOT [LENT ...]

ROOT then holds what the image would hold, and ``chroot ROOT`` runs it. LENT are files and folders
of this machine that pip needs there, as its settings or a folder of wheels. Needs root.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
IGNORED = DOCKERFILE.with_name("Dockerfile.dockerignore")
KNOWN = (
    *("FROM", "ARG", "RUN", "USER", "ENV", "WORKDIR", "COPY", "VOLUME", "EXPOSE"),
    *("HEALTHCHECK", "ENTRYPOINT", "CMD"),
)
LENT = ("/proc", "/dev", "/etc/resolv.conf")


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction; ``text`` is what follows it, lines joined."""

    kind: str
    text: str

    @property
    def words(self) -> list[str]:
        """Of the JSON form, or as a shell reads them."""
        if self.text.startswith("["):
            words: list[str] = json.loads(self.text)
            return words
        return shlex.split(self.text)

    @property
    def options(self) -> dict[str, str]:
        """--name=value before the rest."""
        return dict(re.findall(r"--([a-z-]+)=(\S+)", self.text))


def read_steps(text: str) -> list[Step]:
    """Raises ValueError: a line that is no instruction that this module knows."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    steps = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        kind, _, rest = line.partition(" ")
        if kind not in KNOWN:
            raise ValueError(f"not an instruction: {line!r}; known are {', '.join(KNOWN)}")
        steps.append(Step(kind, rest.strip()))
    return steps


def steps_of(steps: list[Step], kind: str) -> list[Step]:
    return [step for step in steps if step.kind == kind]


def carry_out(steps: list[Step], root: Path) -> None:
    """RUN, COPY, USER, ENV, ARG and WORKDIR; raises CalledProcessError: a RUN step failed."""
    environ = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    passed = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    user, folder = "0:0", "/"
    for step in steps:
        sys.stdout.write(f"{step.kind} {step.text}\n")
        sys.stdout.flush()
        match step.kind:
            case "ENV" | "ARG":
                name, _, value = step.text.partition("=")
                environ[name] = value
            case "USER":
                user = step.text
            case "WORKDIR":
                folder = step.text
                subprocess.run(["install", "-d", *_owned_by(user), f"{root}{folder}"], check=True)
            case "COPY":
                copy(step, root / folder.lstrip("/"))
            case "RUN":
                command = ["chroot", f"--userspec={user}", str(root), "/bin/sh", "-c"]
                command.append(f"cd {folder} && {step.text}")
                subprocess.run(command, check=True, env=environ | passed)


def copy(step: Step, folder: Path) -> None:
    """As COPY: of a folder its content; links stay links; nothing that is ignored."""
    *sources, target = [word for word in step.words if not word.startswith("--")]
    for source in sources:
        here, there = ROOT / source, folder / target
        if here.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(here, there, symlinks=True, ignore=ignore, dirs_exist_ok=True)
        else:
            there = shutil.copy(here, there / here.name if target.endswith("/") else there)
        subprocess.run(["chown", "-hR", step.options["chown"], str(there)], check=True)


def _owned_by(user: str) -> list[str]:
    owner, _, group = user.partition(":")
    return ["-o", owner, "-g", group]


def main(root: Path, lent: list[str]) -> None:
    mounted = []
    try:
        for path in map(Path, (*LENT, *lent)):
            there = root / str(path).lstrip("/")
            if path.exists():
                if path.is_dir():
                    there.mkdir(parents=True, exist_ok=True)
                else:
                    there.touch()
                subprocess.run(["mount", "--rbind", str(path), str(there)], check=True)
                subprocess.run(["mount", "--make-rslave", str(there)], check=True)
                mounted.append(there)
        carry_out(read_steps(DOCKERFILE.read_text()), root)
    finally:
        for there in reversed(mounted):
            subprocess.run(["umount", "--recursive", str(there)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
