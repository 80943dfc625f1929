"""A cluster on three hosts from `ray up` to `down --all`, and every fault between, under load.

One cluster for all of it, in the order of the file; -k picks faults. `HOSTS_OUT=FOLDER` keeps the
figures and plots. Two replicas of each shard; 100 requests/s to the front end of every host.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.chaos.corpus import make_store
from tests.chaos.oracle import Corpus
from tests.hosts.doors import QUIET_S, Action, Cost, cost_of, under_load, write_report
from tests.hosts.launched import CHECKOUT, CONFIG, Launched, wait_until
from tests.hosts.rig import STORE, Host, environment_folders, raised
from tests.hosts.test_two_hosts import K, nearest

pytestmark = pytest.mark.timeout(900)

REPLICAS = 2
# until a cluster is whole again that has lost a process or a host: replicas move back one by one,
# and each old one lives on for the queries that began on it
WHOLE_S = 360.0
FULL_AGAIN_S = 2.0
AWAY_S = 30.0
HEAD_AWAY_S = 60.0
# answered by a router when it was killed: 100 requests/s of a few ms each, or one batch that waits
IN_FLIGHT = 10

# roles -> how their processes' titles begin
SHARD, ROUTER, CONTROLLER = "ray::ShardActor", "ray::ServeReplica", "ray::Controller"
SERVE_CONTROLLER, HAPROXY = "ray::ServeController", "haproxy"


@pytest.fixture(scope="module")
def launched() -> Iterator[Launched]:
    with raised(3, [*environment_folders(), CHECKOUT]) as rig:
        launched = Launched(rig)
        launched.prepare_desk()
        launched.up()
        wait_until(lambda: hosts_of(launched) == 3, within_s=120, what="three hosts in Ray")
        yield launched


@pytest.fixture(scope="module")
def corpus(launched: Launched) -> Corpus:
    return make_store(launched.rig.store)


@pytest.fixture(scope="module")
def served(launched: Launched, corpus: Corpus) -> Launched:
    launched.shardline(launched.head, f"--set cluster.replicas={REPLICAS} serve", timeout_s=240)
    return launched


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return Path(os.environ.get("HOSTS_OUT", tmp_path))


@dataclass(frozen=True)
class Setting:
    """What a fault's test needs."""

    served: Launched
    corpus: Corpus
    out: Path

    def cost(
        self, name: str, actions: list[Action], *, seconds: float, away: tuple[Host, ...] = ()
    ) -> Cost:
        """Runs the load with these actions, waits until all is whole, writes the report."""
        hosts = self.served.rig.hosts
        key = self.served.shardline(self.served.head, "keys show").stdout.strip()
        records = under_load(hosts, self.corpus, key, actions, seconds=seconds)
        cost = cost_of(records, actions, away)
        whole_s = None
        try:
            whole_s = self.wait_whole()
        finally:
            print(f"\n{name}: {cost}, whole {whole_s} s after the load")
            more = {"whole_after_the_load_s": whole_s}
            write_report(self.out, name, records, actions, cost, more)
        return cost

    def wait_whole(self) -> float:
        host = self.served.rig.hosts[1]
        try:
            return wait_until(lambda: self.served.is_whole(host), within_s=WHOLE_S, what="whole")
        except AssertionError as error:
            said = self.served.shardline(host, "status", check=False)
            raise AssertionError(f"{error}\n{said.stdout}{said.stderr}") from error


@pytest.fixture
def setting(served: Launched, corpus: Corpus, out: Path) -> Setting:
    setting = Setting(served, corpus, out)
    setting.wait_whole()
    return setting


def hosts_of(launched: Launched) -> int:
    """How many hosts live, as Ray on the head sees it."""
    code = "import ray; ray.init(log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    done = launched.head.run(f'~/shardline/.venv/bin/python -c "{code}" 2> /dev/null', check=False)
    return int(done.stdout or 0)


def one_of(hosts: list[Host], title: str) -> tuple[Host, int]:
    """A process whose title begins so: on the last host that has one."""
    for host in reversed(hosts):
        for pid, words in host.processes().items():
            if words[0].startswith(title):
                return host, pid
    raise AssertionError(f"no host has a {title}")


def killing(setting: Setting, title: str) -> Callable[[], None]:
    return lambda: os.kill(one_of(setting.served.rig.hosts, title)[1], 9)


def test_every_host_answers_and_knows_the_cluster(setting: Setting) -> None:
    number = 11
    item = int(setting.corpus.ids[number])
    for host in setting.served.rig.hosts:
        said = setting.served.shardline(host, f"query --item {item} -k {K} --json").stdout
        assert [str(each) for each in nearest(setting.corpus, number)] == [
            line.split(":")[1].strip(" ,") for line in said.splitlines() if '"item_id"' in line
        ], host.name
        assert "generation" in setting.served.shardline(host, "status").stdout
        setting.served.shardline(host, "doctor")
    report = setting.served.report(setting.served.head)
    per_host = Counter(replica["host"] for replica in report["replicas"])
    assert max(per_host.values()) - min(per_host.values()) <= 1
    assert len(report["routers"]) == 3


def test_a_batch_job_runs_on_the_heads_job_server(setting: Setting) -> None:
    """Item-to-item for all items, by Ray Data over the hosts."""
    words = f"-c {CONFIG} batch --items --out {STORE}/results -k {K}"
    job = f"cd ~/shardline && shardline {words}"
    setting.served.head.run(f"ray job submit -- bash --login -c '{job}'", timeout_s=300)
    results = pq.read_table(setting.served.rig.store / "results")
    assert results["query_id"].to_pylist() == setting.corpus.ids.tolist()
    number = 11
    assert results["ids"][number].as_py() == nearest(setting.corpus, number)


@pytest.mark.parametrize(
    ("name", "title", "may_fail"),
    [
        ("shard-killed", SHARD, 0),
        ("router-killed", ROUTER, IN_FLIGHT),
        ("haproxy-killed", HAPROXY, IN_FLIGHT),
        ("controller-killed", CONTROLLER, 0),
        ("serve-controller-killed", SERVE_CONTROLLER, 0),
    ],
)
def test_a_killed_process_costs_what_it_was_answering(
    setting: Setting, name: str, title: str, may_fail: int
) -> None:
    actions = [Action(at_s=QUIET_S, label=name, do=killing(setting, title))]
    cost = setting.cost(name, actions, seconds=QUIET_S + 20)
    assert cost.failed <= may_fail
    assert cost.partial == 0
    assert "ConnectionRefusedError" not in cost.failures


@pytest.mark.parametrize("name", ["host-without-power", "host-cut-off"])
def test_a_lost_host_costs_others_next_to_nothing(setting: Setting, name: str) -> None:
    lost = setting.served.rig.hosts[2]
    begin, end = {
        "host-without-power": (lost.power_off, lost.power_on),
        "host-cut-off": (lost.cut, lost.mend),
    }[name]
    actions = [
        Action(at_s=QUIET_S, label=name, do=begin),
        Action(at_s=QUIET_S + AWAY_S, label="back", do=end),
    ]
    cost = setting.cost(name, actions, seconds=QUIET_S + AWAY_S + 60, away=(lost,))
    assert cost.answered_share >= 0.999
    assert cost.last_harm_s is None or cost.last_harm_s <= FULL_AGAIN_S


def test_two_hosts_that_do_not_reach_each_other_answer_on(setting: Setting) -> None:
    rig = setting.served.rig
    _, two, three = (host.number for host in rig.hosts)
    actions = [
        Action(at_s=QUIET_S, label="parted", do=lambda: rig.part(two, three)),
        Action(at_s=QUIET_S + AWAY_S, label="joined", do=lambda: rig.join(two, three)),
    ]
    cost = setting.cost("hosts-parted", actions, seconds=QUIET_S + AWAY_S + 20)
    assert cost.answered_share >= 0.999
    assert cost.last_harm_s is None or cost.last_harm_s <= FULL_AGAIN_S


def test_without_the_gcs_queries_go_on_and_a_restart_finds_all(setting: Setting) -> None:
    kill = killing_gcs(setting.served.head)
    again = lambda: setting.served.up("--restart-only")  # noqa: E731
    actions = [
        Action(at_s=QUIET_S, label="GCS killed", do=kill),
        Action(at_s=QUIET_S + HEAD_AWAY_S, label="ray up --restart-only", do=again),
    ]
    head = setting.served.head
    cost = setting.cost("gcs-killed", actions, seconds=QUIET_S + HEAD_AWAY_S + 60, away=(head,))
    assert cost.failed == 0
    assert cost.partial == 0


def test_without_the_head_queries_go_on_and_a_restart_finds_all(setting: Setting) -> None:
    head = setting.served.head

    def again() -> None:
        head.power_on()
        setting.served.up("--restart-only")

    actions = [
        Action(at_s=QUIET_S, label="head without power", do=head.power_off),
        Action(at_s=QUIET_S + HEAD_AWAY_S, label="power, ray up --restart-only", do=again),
    ]
    cost = setting.cost("head-lost", actions, seconds=QUIET_S + HEAD_AWAY_S + 60, away=(head,))
    assert cost.answered_share >= 0.999
    assert cost.last_harm_s is None or cost.last_harm_s <= FULL_AGAIN_S


def test_down_leaves_nothing_on_any_host(served: Launched) -> None:
    served.shardline(served.head, "down --all")
    for host in served.rig.hosts:
        wait_until(lambda host=host: not host.processes(), within_s=20, what=f"{host.name} empty")


def killing_gcs(head: Host) -> Callable[[], None]:
    def kill() -> None:
        found = [pid for pid, words in head.processes().items() if "gcs_server" in words[0]]
        assert len(found) == 1
        os.kill(found[0], 9)

    return kill
