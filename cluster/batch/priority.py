"""The priority of a job's threads: those that serve on the same host come first."""

import os

NICENESS = 10


def give_way() -> None:
    """Lowers the priority of the calling thread, and of threads and processes that it starts from
    here on; once however often it is called."""
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS)  # Linux: of a thread, not of all of a process
