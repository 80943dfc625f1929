"""People you may know: two towers that are alike, nobody's friends, and nobody who is blocked.

    python docs/recipes/people_you_may_know.py

Everybody is a user and an item with the same features, every friendship is an interaction in both
directions, and the loss counts both. So people are compared by the item tower on both sides
(`item_ids`): if A is suggested to B with a score, B has that score for A. Friends are left out by
`exclude`. Blocks are lists held by the server, `block:A` and `block:B`: A blocking B writes both.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from recipe import TIMEOUT_MS, Recipe, command

from shardline import Client

COMMUNITY = 25  # people, more or less, who share an employer, a school and a city
CITIES, SCHOOLS, EMPLOYERS = 12, 40, 60
GROUPS = 80
SAME_SHARE = 0.85  # of the people of a community share each of its marks
FRIENDS = 10  # friendships that each person looks for inside their community
K = 20
ASKED = 200
BLOCKS = 20
CONFIG = {
    "training": {
        "dim": 64,
        "epochs": 8,
        "batch_size": 512,
        "validation": {"k": K},
        "loss": {"symmetric": 0.5},
        "towers": {
            side: {
                "features": [
                    {"kind": "categorical", "column": "city"},
                    {"kind": "categorical", "column": "school", "dim": 16},
                    {"kind": "categorical", "column": "employer", "dim": 16},
                    {"kind": "multi_valued", "column": "groups"},
                ],
                "hidden": [64],
            }
            for side in ("query", "item")
        },
    },
    "cluster": {"shards": 2},
}


@dataclass(frozen=True, slots=True)
class People:
    """community (n,); marks: a column per feature; known, later: pairs (m, 2), each once, of
    friends now and of people who will become friends."""

    community: np.ndarray
    marks: dict[str, pa.Array]
    known: np.ndarray
    later: np.ndarray

    def friends_of(self, person: int, pairs: np.ndarray) -> list[int]:
        left, right = pairs.T
        return sorted({*right[left == person].tolist(), *left[right == person].tolist()})


def make_people(count: int, rng: np.random.Generator) -> People:
    community = rng.permutation(np.arange(count) % (count // COMMUNITY))
    marks = {
        "city": mark(community, "city", CITIES, rng),
        "school": mark(community, "school", SCHOOLS, rng),
        "employer": mark(community, "employer", EMPLOYERS, rng),
        "groups": groups_of(community, rng),
    }
    pairs = friendships(community, rng)
    is_later = rng.random(len(pairs)) < 0.2
    return People(community, marks, pairs[~is_later], pairs[is_later])


def mark(community: np.ndarray, name: str, values: int, rng: np.random.Generator) -> pa.Array:
    """Most people have the mark of their community, the others any."""
    of_community = rng.integers(0, values, community.max() + 1)[community]
    is_same = rng.random(len(community)) < SAME_SHARE
    chosen = np.where(is_same, of_community, rng.integers(0, values, len(community)))
    return pa.array([f"{name} {value}" for value in chosen])


def groups_of(community: np.ndarray, rng: np.random.Generator) -> pa.Array:
    """Three of the six groups that a community likes, and one that anybody may like."""
    liked = rng.integers(0, GROUPS, (community.max() + 1, 6))
    chosen = [
        sorted({*rng.choice(liked[c], 3, replace=False).tolist(), int(rng.integers(GROUPS))})
        for c in community
    ]
    return pa.array([[f"group {value}" for value in each] for each in chosen])


def friendships(community: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(m, 2) pairs, the smaller first, each once: within communities, and one person elsewhere."""
    people = np.arange(len(community))
    pairs = set()
    for person in people:
        near = np.flatnonzero((community == community[person]) & (people != person))
        wanted = {*rng.choice(near, min(len(near), FRIENDS // 2), replace=False).tolist()}
        wanted.add(int(rng.integers(len(people))))
        pairs |= {(min(person, each), max(person, each)) for each in wanted - {person}}
    return np.array(sorted(pairs))


def people_you_may_know(recipe: Recipe) -> None:
    """From friendships to suggestions without friends and without who is blocked."""
    rng = np.random.default_rng(2026)
    people = make_people(recipe.size(5000, 1500), rng)
    count = len(people.community)
    friends = np.concatenate([people.known, people.known[:, ::-1]])
    friends = friends[rng.permutation(len(friends))]
    columns = dict(people.marks)
    recipe.write_tables(
        users=pa.table({"user_id": np.arange(count), **columns}),
        items=pa.table({"item_id": np.arange(count), **columns}),
        interactions=pa.table(
            {
                "user_id": friends[:, 0],
                "item_id": friends[:, 1],
                "timestamp": np.arange(len(friends)),
            }
        ),
    )
    recipe.configure(CONFIG)
    recipe.build("--test-per-user", "0", "--val-users", "300")
    asked = rng.choice(np.unique(people.later), ASKED, replace=False)
    with recipe.served() as client:
        show_suggestions(recipe, client, people, asked)
        show_symmetry(recipe, client, asked)
        show_blocks(recipe, client, people, asked)


def suggestions(client: Client, people: People, asked: np.ndarray) -> np.ndarray:
    """(n, K) people who are not friends yet."""
    friends = [people.friends_of(person, people.known) for person in asked.tolist()]
    return client.search(item_ids=asked, k=K, exclude=friends, timeout_ms=TIMEOUT_MS).ids


def show_suggestions(recipe: Recipe, client: Client, people: People, asked: np.ndarray) -> None:
    """Friends are not suggested, people who become friends later are."""
    plain = client.search(item_ids=asked, k=K, timeout_ms=TIMEOUT_MS).ids
    found = suggestions(client, people, asked)
    now = [set(people.friends_of(person, people.known)) for person in asked.tolist()]
    later = [set(people.friends_of(person, people.later)) for person in asked.tolist()]
    recipe.outcome("friends among all suggestions, nobody excluded", ">= 200", hits(plain, now))
    recipe.outcome("friends among all suggestions", "= 0", hits(found, now))
    recipe.outcome("people who are suggested to themselves", "= 0", (found == asked[:, None]).sum())
    recipe.outcome(f"people with {K} suggestions", "= 100 %", (found >= 0).all(axis=1).mean())
    recall = hits(found, later) / sum(map(len, later))
    recipe.outcome(f"later friends among {K} suggestions", ">= 40 %", recall)
    recipe.outcome(f"the same, of {K} drawn at random", "<= 2 %", K / len(people.community))


def hits(found: np.ndarray, wanted: list[set[int]]) -> int:
    return sum(len(set(row.tolist()) & each) for row, each in zip(found, wanted, strict=True))


def show_symmetry(recipe: Recipe, client: Client, asked: np.ndarray) -> None:
    """The score of B for A beside that of A for B."""
    left, right = asked[: ASKED // 2], asked[ASKED // 2 :]

    def scores(of: np.ndarray, to: np.ndarray) -> np.ndarray:
        """(n,) the score of each of ``to`` for the same one of ``of``."""
        filters = [{"item_id": person} for person in to.tolist()]
        answer = client.search(item_ids=of, k=1, filter=filters, timeout_ms=TIMEOUT_MS)
        assert (answer.ids[:, 0] == to).all()
        return answer.scores[:, 0]

    differences = np.abs(scores(left, right) - scores(right, left))
    recipe.outcome(
        "largest difference of the scores of A for B and B for A", "<= 0.00001", differences.max()
    )


def show_blocks(recipe: Recipe, client: Client, people: People, asked: np.ndarray) -> None:
    """Each of some people blocks the best suggestion; neither sees the other until that ends."""
    blockers = asked[:BLOCKS].tolist()
    blocked = [int(row[0]) for row in suggestions(client, people, asked[:BLOCKS])]

    def seen(of: list[int], to: list[int]) -> int:
        """How many of ``of`` are suggested to the same one of ``to``."""
        return sum(
            who in suggested_to(client, people, person) for who, person in zip(of, to, strict=True)
        )

    before = seen(blocked, blockers), seen(blockers, blocked)
    recipe.outcome("people suggested to whoever will block them, of 20", "= 20", before[0])
    recipe.outcome("the other way around", ">= 10", before[1])
    for who, whom in zip(blockers, blocked, strict=True):
        client.change_list(f"block:{who}", add=[whom])
        client.change_list(f"block:{whom}", add=[who])
    recipe.outcome("blocked people suggested to who blocked them", "= 0", seen(blocked, blockers))
    recipe.outcome("people suggested to whom they blocked", "= 0", seen(blockers, blocked))
    for who, whom in zip(blockers, blocked, strict=True):
        client.change_list(f"block:{who}", remove=[whom])
        client.change_list(f"block:{whom}", remove=[who])
    recipe.outcome("suggested again once no longer blocked, of 20", "= 20", seen(blocked, blockers))


def suggested_to(client: Client, people: People, person: int) -> set[int]:
    """Suggestions as they are shown: without friends, and without the person's block list."""
    answer = client.search(
        item_ids=[person],
        k=K,
        exclude=[people.friends_of(person, people.known)],
        exclude_lists=[f"block:{person}"],
        timeout_ms=TIMEOUT_MS,
    )
    return set(answer.ids[0].tolist())


if __name__ == "__main__":
    command(people_you_may_know)()
