"""The load client against an endpoint that misbehaves: schedule, stalls, refusals, failures."""

import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from shardline.bench.load.fleet import ask, judge, run_fleet
from shardline.bench.load.http_bytes import Request, message_of
from shardline.bench.load.load_client import LoadClient, LoadJob, Records
from shardline.bench.load.stats import Figures, figures, latencies_ms, p50_p99, timeline
from shardline.cluster.serving.ray_session import free_port
from shardline.shards.core.errors import Unavailable
from tests.unit.fake_endpoint import FakeEndpoint, running


@pytest.fixture
def endpoint() -> Iterator[tuple[FakeEndpoint, tuple[str, int]]]:
    fake = FakeEndpoint()
    with running(fake) as address:
        yield fake, address


def job(
    address: tuple[str, int],
    bodies: Sequence[bytes],
    *,
    count: int,
    rate: float,
    connections: int = 64,
    timeout_s: float = 10.0,
    closed_s: float | None = None,
) -> LoadJob:
    """Request i sends body i modulo their number, at i / rate."""
    return LoadJob(
        address=address,
        messages=tuple(message_of(Request("POST", "/", body), address) for body in bodies),
        order=np.arange(count) % len(bodies),
        intended_s=np.arange(count) / rate,
        kept=np.arange(count) % 2 == 0,
        max_connections=connections,
        timeout_s=timeout_s,
        closed_s=closed_s,
    )


def run(work: LoadJob) -> Records:
    return LoadClient(work).run(time.monotonic() + 0.02)


def measured(records: Records, seconds: float) -> Figures:
    return figures(records, warm_up_s=0, seconds=seconds, batch=1)


def test_requests_leave_on_schedule_and_answers_are_kept(
    endpoint: tuple[FakeEndpoint, tuple[str, int]],
) -> None:
    fake, address = endpoint
    records = run(job(address, [b"0", b"partial", b"2"], count=30, rate=300))
    # in any order: two that are under way at once, each on its connection, may overtake
    assert sorted(fake.bodies) == sorted([b"0", b"partial", b"2"] * 10)
    assert (records.status == 200).all()
    assert (records.sent_s >= records.intended_s).all(), "never early"
    assert np.median(records.sent_s - records.intended_s) < 0.1
    np.testing.assert_array_equal(records.coverage, [1.0, 0.5, 1.0] * 10)
    assert sorted(records.bodies) == list(range(0, 30, 2)), "bodies of the kept ones, no others"
    found = measured(records, 0.1)
    assert (found.sent, found.answered, found.rejected, found.failed) == (30, 30, 0, 0)
    assert (found.partial, found.coverage_min) == (10, 0.5)


def test_a_stall_of_the_server_is_charged_to_every_request_it_delays() -> None:
    """Coordinated omission: of 300 requests in 1.5 s, those due in the one second of the stall
    wait from 1 s down to nothing. A client that waits for answers would see a single slow one."""
    with running(FakeEndpoint(stall_at=40, stall_s=1.0)) as address:
        records = run(job(address, [b"x"], count=300, rate=200, connections=512))
    found = measured(records, 1.5)
    assert found.answered == 300
    assert found.p99_ms is not None and found.p99_ms > 900
    assert found.p50_ms is not None and found.p50_ms > 200, "two thirds of them were delayed"
    assert int((latencies_ms(records) > 100).sum()) > 150
    bins = timeline(records, warm_up_s=0, bin_s=0.5)
    assert [each.sent for each in bins] == [100, 100, 100]
    assert bins[0].p99_ms is not None and bins[0].p99_ms > 900


def test_a_stall_shows_even_when_connections_run_out() -> None:
    with running(FakeEndpoint(stall_at=40, stall_s=1.0)) as address:
        records = run(job(address, [b"x"], count=300, rate=200, connections=2))
    found = measured(records, 1.5)
    assert found.p99_ms is not None and found.p99_ms > 900, "waiting for a connection counts"
    client = judge(records, [0.1], found.p99_ms)
    assert client.bottleneck is not None, "and the client says that it sent late"


def test_a_closed_loop_hides_the_same_stall() -> None:
    with running(FakeEndpoint(stall_at=40, stall_s=0.5)) as address:
        records = run(job(address, [b"x"], count=10_000, rate=1, connections=1, closed_s=1.5))
    found = measured(records, 1.5)
    assert found.answered > 200
    assert found.max_ms is not None and found.max_ms > 450
    assert found.p99_ms is not None and found.p99_ms < 100, "only one request saw the stall"
    assert found.sent == found.answered, "what was never sent is not counted"


def posts(*bodies: bytes) -> list[Request]:
    return [Request("POST", "/", body) for body in bodies]


def test_sequential_is_one_connection_that_asks_again_as_soon_as_it_is_answered(
    endpoint: tuple[FakeEndpoint, tuple[str, int]],
) -> None:
    fake, (host, port) = endpoint
    bodies = [b"number %d" % number for number in range(7)]
    found, kept = ask(
        f"http://{host}:{port}", posts(*bodies), seconds=0.3, warm_up_s=0.1, connections=1, kept=3
    )
    assert fake.most_connections == 1
    assert fake.bodies == [bodies[number % 7] for number in range(len(fake.bodies))], "in order"
    assert 20 < found.answered == found.sent < len(fake.bodies), "the warm-up is not counted"
    assert found.failed == found.rejected == 0
    assert sorted(kept) == [0, 1, 2]


def test_sequential_failures_are_counted_apart_and_the_connection_is_opened_again() -> None:
    fake = FakeEndpoint()
    with running(fake) as (host, port):
        found, _ = ask(
            f"http://{host}:{port}",
            posts(b"fine", b"500", b"close", b"garbage"),
            seconds=0.2,
            warm_up_s=0,
            connections=1,
        )
    kinds = sorted(kind.split(" not ours")[0] for kind in found.failures)
    assert kinds == ["HTTP 500", "closed by the server", "not an HTTP answer"]
    assert found.sent == found.answered + found.failed
    assert abs(found.answered - found.sent / 4) <= 1


def test_at_a_rate_requests_are_evenly_spaced_and_their_answers_kept(
    endpoint: tuple[FakeEndpoint, tuple[str, int]],
) -> None:
    fake, (host, port) = endpoint
    url = f"http://{host}:{port}"
    found, kept = ask(url, posts(b"a", b"partial"), rate=200, seconds=0.3, warm_up_s=0.1, kept=80)
    assert len(fake.bodies) == 80
    assert (found.sent, found.answered) == (60, 60)
    assert sorted(kept) == list(range(80))
    assert found.offered_rate == pytest.approx(200)
    assert found.partial == 30


def test_without_any_answer_it_says_what_failed(
    endpoint: tuple[FakeEndpoint, tuple[str, int]],
) -> None:
    _, (host, port) = endpoint
    with pytest.raises(Unavailable, match=r"no request was answered; got 2 x HTTP 429, 2 x HTTP 5"):
        ask(f"http://{host}:{port}", posts(b"429", b"500"), rate=100, seconds=0.04, warm_up_s=0)
    with pytest.raises(Unavailable, match="4 x ConnectionRefusedError"):
        gone = f"http://127.0.0.1:{free_port()}"
        ask(gone, posts(b"x"), rate=100, seconds=0.04, warm_up_s=0)


def test_two_percentiles_of_all_samples() -> None:
    assert p50_p99([float(n) for n in range(101)]) == {"p50": 50.0, "p99": 99.0}


def test_refusals_and_failures_are_counted_apart_from_latencies(
    endpoint: tuple[FakeEndpoint, tuple[str, int]],
) -> None:
    _, address = endpoint
    bodies = [b"fine", b"429", b"500", b"close", b"garbage", b"partial"]
    records = run(job(address, bodies, count=60, rate=300))
    found = measured(records, 0.2)
    assert (found.sent, found.answered, found.rejected) == (60, 20, 10)
    assert found.failed == 30
    assert found.failures == {
        "HTTP 500 not ours: '<html><h1>Bad Gateway</h1>xxxxxxxxxxxxx'": 10,
        "closed by the server": 10,
        "not an HTTP answer": 10,
    }
    assert int((~np.isnan(latencies_ms(records))).sum()) == 20
    assert found.partial == 10
    assert records.errors[1] == "HTTP 429 overloaded"


def test_no_answer_in_time_is_a_failure(endpoint: tuple[FakeEndpoint, tuple[str, int]]) -> None:
    _, address = endpoint
    records = run(job(address, [b"never", b"fine"], count=10, rate=100, timeout_s=0.1))
    found = measured(records, 0.1)
    assert found.failures == {"timeout": 5}
    assert found.answered == 5


def test_no_connection_in_time_is_a_failure(endpoint: tuple[FakeEndpoint, tuple[str, int]]) -> None:
    _, address = endpoint
    work = job(address, [b"never"], count=10, rate=1000, connections=1, timeout_s=0.1)
    found = measured(run(work), 0.01)
    assert found.answered == 0
    assert sum(found.failures.values()) == 10
    assert set(found.failures) <= {"timeout", "no free connection"}
    assert found.p50_ms is None and found.max_ms is None


def test_a_server_that_is_not_there_is_a_failure() -> None:
    records = run(job(("127.0.0.1", free_port()), [b"x"], count=5, rate=500))
    assert measured(records, 0.1).failures == {"ConnectionRefusedError": 5}


def test_connections_grow_with_what_is_outstanding_and_no_further() -> None:
    fake = FakeEndpoint(stall_at=0, stall_s=0.2)
    with running(fake) as address:
        records = run(job(address, [b"x"], count=20, rate=1000, connections=7))
    assert records.connections == 7 == fake.most_connections
    assert (records.status == 200).all()


def test_bodies_larger_than_a_socket_buffer_arrive_whole(
    endpoint: tuple[FakeEndpoint, tuple[str, int]],
) -> None:
    fake, address = endpoint
    large = np.random.default_rng(0).bytes(4 << 20)
    records = run(job(address, [large], count=3, rate=50))
    assert fake.bodies == [large] * 3
    assert (records.status == 200).all()


def test_several_processes_are_one_schedule(
    endpoint: tuple[FakeEndpoint, tuple[str, int]],
) -> None:
    fake, address = endpoint
    work = job(address, [b"0", b"429", b"2"], count=90, rate=300)
    ticks: list[float] = []
    records, cpu_shares = run_fleet(work, 2, ticks.append)
    assert len(cpu_shares) == 2
    assert sorted(fake.bodies) == sorted([b"0", b"429", b"2"] * 30)
    np.testing.assert_array_equal(records.status, [200, 429, 200] * 30)
    np.testing.assert_allclose(records.intended_s, work.intended_s)
    assert (records.sent_s >= records.intended_s).all()
    assert sorted(records.bodies) == [n for n in range(0, 90, 2) if n % 3 != 1]
    assert ticks[0] < 0 < ticks[-1]


def test_a_client_process_that_dies_is_an_error_not_a_short_result(
    endpoint: tuple[FakeEndpoint, tuple[str, int]], capfd: pytest.CaptureFixture[str]
) -> None:
    _, address = endpoint
    work = job((address[0], 1 << 20), [b"x"], count=3, rate=100)  # no such port
    with pytest.raises(Unavailable, match="ended without a result"):
        run_fleet(work, 1)
    assert "OverflowError" in capfd.readouterr().err


def test_a_busy_client_is_named() -> None:
    records = Records.empty(np.arange(10) / 10)
    records.sent_s[:] = records.intended_s
    assert judge(records, [0.5], 10).bottleneck is None
    busy = judge(records, [0.5, 0.95], 10).bottleneck
    assert busy is not None and "95%" in busy
    records.sent_s += 0.004
    assert judge(records, [0.5], 100).bottleneck is None, "4 ms late beside a p99 of 100"
    late = judge(records, [0.5], 10).bottleneck
    assert late is not None and "4.0 ms late" in late
    assert judge(records, [0.5], 10, closed=True).bottleneck is None
