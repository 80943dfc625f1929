"""The control groups around this process, whose limits count besides the machine's own."""

from collections.abc import Iterator
from pathlib import Path


def own_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the groups that limit this process by ``controller``, its own first.

    root: where /proc and /sys are. Of either version of control groups. Folders that a container
    does not see are among them too, and have no files.
    """
    mounted = root / "sys/fs/cgroup"
    for line in lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top = mounted
        elif controller in controllers.split(","):
            top = mounted / controller
        else:
            continue
        folder = top / path.lstrip("/")
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(top))


def lines(path: Path) -> list[str]:
    """Of a file of the kernel's; none where it is not to be seen."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
