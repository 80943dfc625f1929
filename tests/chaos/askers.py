"""Honest clients: threads that ask all along, have every answer judged, and note what came.

Three of them: the client without retries, the client as it comes, and JSON over a plain socket,
which sees status codes and content types as they are.
"""

import http.client
import json
import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np

from shardline.cluster.serving.endpoint import Address
from shardline.router.client.answers import SearchAnswer
from shardline.router.client.retries import Retry
from shardline.router.client.sync_client import Client
from shardline.router.contract import PROBLEM_TYPE, Coverage, Degraded, Reason
from shardline.shards.core.errors import ShardlineError
from tests.chaos.corpus import USER
from tests.chaos.oracle import TITLE, Finding, Oracle, QueryKind, Question, Said
from tests.chaos.windows import (
    CONNECTION,
    FOREIGN,
    OK,
    OVERLOADED,
    TIMED_OUT,
    UNAVAILABLE,
    UNTIMED,
    Outcome,
)
from tests.chaos.written import WRITTEN_DIM

TIMEOUT_MS = 2000.0  # asked of the server
CLIENT_TIMEOUT_S = 20.0
PAUSE_S, PAUSE_AFTER_ERROR_S = 0.01, 0.05
MAX_K = 50
WAIT = (OVERLOADED, UNAVAILABLE)  # codes after which a client is told when to ask again
TITLED = 0.1  # share of queries that want titles

Answer = Said | tuple[str, str]  # or an error's code and text


@dataclass(slots=True)
class Log:
    """Outcomes and findings of all askers, each list in the order in which they came."""

    outcomes: list[Outcome] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, outcome: Outcome, findings: list[Finding]) -> None:
        with self._lock:
            self.outcomes.append(outcome)
            self.findings.extend(findings)

    def report(self, finding: Finding) -> None:
        with self._lock:
            self.findings.append(finding)

    def since(self, place: int) -> list[Outcome]:
        """The outcomes from the place-th on."""
        with self._lock:
            return self.outcomes[place:]


class Way(Protocol):
    """One way of asking; used by one thread."""

    name: str
    repeats: bool  # of itself, what failed

    def ask(self, question: Question) -> Answer: ...

    def close(self) -> None: ...


class ByClient:
    """The blocking client, with msgpack."""

    def __init__(self, name: str, address: Address, retry: Retry) -> None:
        self.name, self.repeats = name, retry.attempts > 1
        self._client = Client(address.url, CLIENT_TIMEOUT_S, key=address.key, retry=retry)

    def ask(self, question: Question) -> Answer:
        try:
            answer = self._client.search(
                **_fields(question),
                k=question.k,
                timeout_ms=TIMEOUT_MS,
                return_=[TITLE] if question.titled else None,
            )
        except ShardlineError as error:
            return error.code, str(error)
        return said_of(answer, titled=question.titled)

    def close(self) -> None:
        self._client.close()


class ByJson:
    """JSON over http.client, on one kept connection."""

    name, repeats = "json", False

    def __init__(self, address: Address) -> None:
        self._host = address.url.removeprefix("http://")
        self._headers = {"Content-Type": "application/json", **dict(address.headers)}
        self._connection: http.client.HTTPConnection | None = None

    def ask(self, question: Question) -> Answer:
        body = {
            name: np.asarray(value).tolist() if name != QueryKind.FEATURES else value
            for name, value in _fields(question).items()
        } | {"k": question.k, "timeout_ms": TIMEOUT_MS}
        if question.titled:
            body["return"] = [TITLE]
        try:
            if self._connection is None:
                self._connection = http.client.HTTPConnection(self._host, timeout=CLIENT_TIMEOUT_S)
            self._connection.request("POST", "/v1/search", json.dumps(body), self._headers)
            response = self._connection.getresponse()
            content = response.read()
        except TimeoutError:
            self.close()
            return TIMED_OUT, f"after {CLIENT_TIMEOUT_S:g} s"
        except (OSError, http.client.HTTPException) as error:
            self.close()
            return CONNECTION, repr(error)
        if response.status == 200:
            return _said(json.loads(content), question)
        return _problem(response, content)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Askers:
    """All honest clients at once, between entering and leaving the block."""

    def __init__(
        self, address: Address, oracle: Oracle, log: Log, clock: Callable[[], float], seed: int
    ) -> None:
        self._oracle, self._log, self._clock = oracle, log, clock
        self._ways: list[Way] = [
            ByClient("client without retries", address, Retry(attempts=1)),
            ByClient("client", address, Retry()),
            ByJson(address),
        ]
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(way, random.Random(f"{seed} {way.name}")))
            for way in self._ways
        ]
        self.needed = {(way.name, kind) for way in self._ways for kind in QueryKind}

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, way: Way, rng: random.Random) -> None:
        with ExitStack() as stack:
            stack.callback(way.close)
            while not self._stopped.is_set():
                question = self._question(rng)
                began = self._clock()
                answer = way.ask(question)
                ended = self._clock()
                self._note(way, question, answer, began, ended)
                self._stopped.wait(PAUSE_S if isinstance(answer, Said) else PAUSE_AFTER_ERROR_S)

    def _note(
        self, way: Way, question: Question, answer: Answer, began: float, ended: float
    ) -> None:
        code, text = (OK, "") if isinstance(answer, Said) else answer
        missing: tuple[int, ...] = ()
        reasons: frozenset[str] = frozenset()
        findings: list[Finding] = []
        if isinstance(answer, Said):
            missing = tuple(sorted(each.shard for each in answer.coverage.degraded))
            reasons = frozenset(each.code for each in answer.coverage.degraded)
            text = ", ".join(f"{d.shard} {d.code}" for d in answer.coverage.degraded)
            findings = [
                Finding(kind=each.kind, text=f"{way.name} {question.kind}: {each.text}", at_s=began)
                for each in self._oracle.faults(question, answer)
            ]
        outcome = Outcome(
            asker=way.name,
            repeats=way.repeats,
            kind=question.kind,
            began_s=began,
            ended_s=ended,
            code=code,
            missing=missing,
            reasons=reasons,
            text=text,
        )
        self._log.add(outcome, findings)

    def _question(self, rng: random.Random) -> Question:
        corpus, kind = self._oracle.corpus, rng.choice(list(QueryKind))
        value: object
        if kind is QueryKind.VECTORS:
            dim = corpus.vectors.shape[1]
            value = np.array([rng.gauss(0, 1) for _ in range(dim)], dtype=np.float32)
            value[-WRITTEN_DIM:] = 0  # where only written items lie
        elif kind is QueryKind.ITEM_IDS:
            value = int(rng.choice(self._oracle.asked_ids))
        else:
            value = rng.randrange(len(corpus.users))
        k, is_titled = rng.randint(1, MAX_K), rng.random() < TITLED
        return Question(kind=kind, value=value, k=k, titled=is_titled)


def said_of(answer: SearchAnswer, *, titled: bool) -> Said:
    """The client's answer to one query."""
    live = answer.ids[0] >= 0
    return Said(
        ids=answer.ids[0][live].tolist(),
        scores=answer.scores[0][live].tolist(),
        generation=answer.generation,
        model_version=answer.model_version,
        coverage=answer.coverage,
        reasons=answer.reasons,
        titles=answer.attributes[TITLE][0] if titled else None,
        titles_missing=answer.attributes_missing,
    )


def _fields(question: Question) -> dict[str, list[object]]:
    value = {USER: question.value} if question.kind is QueryKind.FEATURES else question.value
    return {str(question.kind): [value]}


def _said(content: dict, question: Question) -> Said:  # type: ignore[type-arg]  # JSON
    coverage = content["coverage"]
    degraded = tuple(Degraded(**each) for each in coverage["degraded"])
    return Said(
        ids=content["ids"][0],
        # as JSON writes float32: the shortest decimal that gives the same one
        scores=np.asarray(content["scores"][0], dtype=np.float32).tolist(),
        generation=content["generation"],
        model_version=content["model_version"],
        coverage=Coverage(**coverage | {"degraded": degraded}),
        reasons=tuple(Reason(**each) for each in content.get("reasons") or ()),
        titles=content["attributes"][TITLE][0] if question.titled else None,
        titles_missing=tuple(Degraded(**d) for d in content.get("attributes_missing") or ()),
    )


def _problem(response: http.client.HTTPResponse, content: bytes) -> tuple[str, str]:
    kind = response.getheader("Content-Type", "")
    if not kind.startswith(PROBLEM_TYPE):
        return FOREIGN, f"HTTP {response.status} {kind} {content[:80]!r}"
    problem = json.loads(content)
    if problem["code"] in WAIT and response.getheader("Retry-After") is None:
        return UNTIMED, f"HTTP {response.status} {problem['code']} without Retry-After"
    return problem["code"], f"HTTP {response.status} {problem['detail']}"


def monotonic_from(start: float) -> Callable[[], float]:
    """A clock that shows the seconds since ``start`` of time.monotonic."""
    return lambda: time.monotonic() - start
