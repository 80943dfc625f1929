"""A block beside which a thread looks at something, from entering to leaving it."""

import threading
from dataclasses import dataclass, field
from typing import Self


@dataclass(slots=True, kw_only=True)
class Watch:
    """``_watch`` runs in the thread, and returns once ``_stopped`` is set."""

    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        raise NotImplementedError
