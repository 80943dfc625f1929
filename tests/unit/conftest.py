"""Unit tests run without Ray: a test that starts it fails at once."""

import pytest
import ray


@pytest.fixture(autouse=True)
def ray_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("unit tests may not start Ray")

    monkeypatch.setattr(ray, "init", refuse)
