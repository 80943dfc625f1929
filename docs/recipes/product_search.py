"""Product search: words to products, by a text tower of hashed n-grams, with live stock and prices.

    python docs/recipes/product_search.py

The query tower reads what was typed, the item tower a product's title and department, both as
hashed n-grams of words and letters: a misspelled word shares most of its letters' n-grams with the
right one. Price and stock are no features: they are attributes that a filter looks at, and that
change while the shop is open. A new product is written by its features, and found at once.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from recipe import TIMEOUT_MS, Recipe, command

from shardline import Client, Seq

BRANDS = [
    *("Arvel", "Bontra", "Cordiva", "Delmore", "Estrup", "Fjordane", "Galvino", "Hestia"),
    *("Ilmari", "Jorvik", "Kestrel", "Lumen", "Marlow", "Nordal", "Orsini", "Pemberly"),
]
COLOURS = [
    *("amber", "black", "blue", "coral", "crimson", "green", "ivory", "magenta"),
    *("olive", "purple", "silver", "teal"),
]
MATERIALS = ["bamboo", "canvas", "cotton", "leather", "linen", "nylon", "steel", "wool"]
KINDS = {
    "garden": ["lantern", "parasol", "planter", "watering can"],
    "home": ["armchair", "blanket", "bookshelf", "cushion", "floor lamp", "rug"],
    "kitchen": ["apron", "frying pan", "kettle", "teapot"],
    "outdoor": ["backpack", "hammock", "sleeping bag", "tent"],
    "wear": ["belt", "gloves", "jacket", "running shoes", "scarf", "umbrella"],
}
DEPARTMENTS = {kind: department for department, kinds in KINDS.items() for kind in kinds}
CLICKS = 4  # products that a searcher clicks
TYPO_SHARE = 0.3  # of the queries
K = 10
AFFORDABLE = 40.0
FILTER = {"in_stock": True, "price": {"$lt": AFFORDABLE}}
NEW_PRODUCTS = 20
CONFIG = {
    "training": {
        "dim": 64,
        "epochs": 8,
        "batch_size": 512,
        "optimiser": {"learning_rate": 0.01},
        "validation": {"k": K},
        "towers": {
            "query": {
                "features": [{"kind": "text", "column": "query", "dim": 64, "chars": [3, 4]}],
                "hidden": [],
            },
            "item": {
                "features": [
                    {"kind": "text", "column": "title", "dim": 64, "chars": [3, 4]},
                    {"kind": "categorical", "column": "department"},
                ],
                "hidden": [],
            },
        },
    },
    "cluster": {"shards": 2},
}


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Products as parts: parts (n, 4) int64, indices of kind, colour, material, brand."""

    parts: np.ndarray
    prices: np.ndarray
    in_stock: np.ndarray

    @property
    def titles(self) -> list[str]:
        return [title_of(parts) for parts in self.parts]


@dataclass(frozen=True, slots=True)
class Query:
    """What was typed, and which products it describes: asked (4,) int64, -1 where any will do."""

    text: str
    asked: np.ndarray
    is_misspelled: bool

    def fits(self, parts: np.ndarray) -> np.ndarray:
        """(n,) whether each product of parts (n, 4) has everything that was asked for."""
        return np.asarray(((self.asked < 0) | (parts == self.asked)).all(axis=1))


def words_of(parts: np.ndarray) -> list[str]:
    """The words of kind, colour, material and brand; "" for those of index -1."""
    names = (list(DEPARTMENTS), COLOURS, MATERIALS, BRANDS)
    return [words[part] if part >= 0 else "" for words, part in zip(names, parts, strict=True)]


def title_of(parts: np.ndarray) -> str:
    kind, colour, material, brand = words_of(parts)
    return f"{brand} {colour} {material} {kind}"


def make_catalogue(count: int, rng: np.random.Generator) -> Catalogue:
    """``count`` different combinations of the parts."""
    shape = (len(DEPARTMENTS), len(COLOURS), len(MATERIALS), len(BRANDS))
    chosen = rng.choice(np.prod(shape), count, replace=False)
    return Catalogue(
        parts=np.stack(np.unravel_index(chosen, shape), axis=1),
        prices=np.round(rng.gamma(2.0, 30.0, count), 2),
        in_stock=rng.random(count) < 0.7,
    )


def make_query(parts: np.ndarray, rng: np.random.Generator) -> Query:
    """Words for a product: always its kind, other parts or not, maybe with a typing error."""
    kept = np.array([True, *(rng.random(3) < (0.7, 0.4, 0.4))])
    asked = np.where(kept, parts, -1)
    kind, colour, material, brand = words_of(asked)
    words = f"{colour} {material} {kind} {brand}".lower().split()
    is_misspelled = bool(rng.random() < TYPO_SHARE)
    if is_misspelled:
        place = max(range(len(words)), key=lambda at: len(words[at]))
        words[place] = misspelled(words[place], rng)
    return Query(" ".join(words), asked, is_misspelled)


def misspelled(word: str, rng: np.random.Generator) -> str:
    """A letter inside the word left out, doubled, or exchanged with the next one."""
    at = int(rng.integers(1, len(word) - 1))
    return str(
        rng.choice(
            [
                word[:at] + word[at + 1 :],
                word[:at] + word[at] + word[at:],
                word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            ]
        )
    )


def make_clicks(
    catalogue: Catalogue, queries: list[Query], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(clicks,) the query and the product of each: products that have what was asked for."""
    who, what = [], []
    for number, query in enumerate(queries):
        fitting = np.flatnonzero(query.fits(catalogue.parts))
        clicked = rng.permutation(fitting)[:CLICKS]
        who.append(np.full(len(clicked), number))
        what.append(clicked)
    return np.concatenate(who), np.concatenate(what)


def product_search(recipe: Recipe) -> None:
    """From the shop's log of searches and clicks to a search that is asked, and written to."""
    rng = np.random.default_rng(2026)
    everything = make_catalogue(recipe.size(8000, 2500) + NEW_PRODUCTS, rng)
    catalogue = Catalogue(
        everything.parts[NEW_PRODUCTS:],
        everything.prices[NEW_PRODUCTS:],
        everything.in_stock[NEW_PRODUCTS:],
    )
    products = len(catalogue.parts)
    searches = recipe.size(12_000, 5000)
    queries = [make_query(catalogue.parts[rng.integers(products)], rng) for _ in range(searches)]
    who, what = make_clicks(catalogue, queries, rng)
    recipe.write_tables(
        users=pa.table({"user_id": np.arange(searches), "query": [q.text for q in queries]}),
        items=pa.table(
            {
                "item_id": np.arange(products),
                "title": catalogue.titles,
                "department": [DEPARTMENTS[words_of(parts)[0]] for parts in catalogue.parts],
                "price": catalogue.prices,
                "in_stock": catalogue.in_stock,
            }
        ),
        interactions=pa.table({"user_id": who, "item_id": what, "timestamp": np.arange(len(who))}),
    )
    recipe.configure(CONFIG)
    recipe.build("--test-per-user", "0", "--val-users", "500")
    fresh = [make_query(catalogue.parts[rng.integers(products)], rng) for _ in range(500)]
    with recipe.served() as client:
        show_relevance(recipe, client, catalogue, fresh)
        show_filters(recipe, client, catalogue, fresh)
        show_new_products(recipe, client, everything.parts[:NEW_PRODUCTS], products)


def features_of(queries: list[Query]) -> list[dict[str, str]]:
    return [{"query": query.text} for query in queries]


def show_relevance(
    recipe: Recipe, client: Client, catalogue: Catalogue, queries: list[Query]
) -> None:
    """Of queries that training has not seen: has the first result everything that was asked for?"""
    answer = client.search(features=features_of(queries), k=K, timeout_ms=TIMEOUT_MS)
    first = catalogue.parts[answer.ids[:, 0]]
    fits = np.array([q.fits(row[None])[0] for q, row in zip(queries, first, strict=True)])
    wrong = np.array([query.is_misspelled for query in queries])
    recipe.outcome(
        "queries whose first result has everything that was asked for", ">= 90 %", fits.mean()
    )
    recipe.outcome("the same, of misspelled queries", ">= 80 %", fits[wrong].mean())


def show_filters(
    recipe: Recipe, client: Client, catalogue: Catalogue, queries: list[Query]
) -> None:
    """Only products in stock below a price, and as many as without a filter."""
    fits = catalogue.in_stock & (catalogue.prices < AFFORDABLE)
    features = features_of(queries)
    bare = client.search(features=features, k=K, timeout_ms=TIMEOUT_MS)
    answer = client.search(features=features, k=K, filter=FILTER, timeout_ms=TIMEOUT_MS)
    full = (answer.ids >= 0).all(axis=1)
    recipe.outcome(
        f"results in stock and below {AFFORDABLE:g}, unfiltered", "<= 40 %", fits[bare.ids].mean()
    )
    recipe.outcome("the same, filtered", "= 100 %", fits[answer.ids[answer.ids >= 0]].mean())
    recipe.outcome(f"filtered answers with {K} results", "= 100 %", full.mean())


def show_new_products(recipe: Recipe, client: Client, parts: np.ndarray, first_id: int) -> None:
    """New products are found by the search after their write, and no more once sold out."""
    ids = np.arange(first_id, first_id + len(parts))
    seq: Seq | None = None
    titles = [title_of(row) for row in parts]
    searched = [{"query": title.lower()} for title in titles]
    products = {
        "title": titles,
        "department": [DEPARTMENTS[words_of(row)[0]] for row in parts],
    }

    def written(price: float, *, in_stock: bool) -> None:
        """All new products, found by searches from here on."""
        nonlocal seq
        attributes = {"price": [price] * len(ids), "in_stock": [in_stock] * len(ids)}
        seq = client.upsert(item_ids=ids, features=products, attributes=attributes).seq

    def found(within: int) -> int:
        """New products among the first results of the search for their titles."""
        answer = client.search(
            features=searched, k=within, filter=FILTER, min_seq=seq, timeout_ms=TIMEOUT_MS
        )
        return int((answer.ids == ids[:, None]).any(axis=1).sum())

    written(AFFORDABLE / 2, in_stock=True)
    recipe.outcome("new products found first, of 20", ">= 18", found(within=1))
    recipe.outcome(f"new products among the first {K}, of 20", "= 20", found(within=K))
    written(AFFORDABLE / 2, in_stock=False)
    recipe.outcome("of them, found when sold out", "= 0", found(within=K))
    written(AFFORDABLE * 2, in_stock=True)
    recipe.outcome("of them, found at twice the price", "= 0", found(within=K))
    written(AFFORDABLE / 2, in_stock=True)
    recipe.outcome("of them, found when back at the old price", "= 20", found(within=K))
    seq = client.delete(ids).seq
    recipe.outcome("of them, found after they were deleted", "= 0", found(within=K))


if __name__ == "__main__":
    command(product_search)()
