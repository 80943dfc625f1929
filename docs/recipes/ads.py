"""Ads: relevant ones that pay, few per advertiser, none twice, and none whose budget is spent.

    python docs/recipes/ads.py

The query tower reads a person and the page they look at, the item tower an ad. Bids lift ads
(`boost`), no advertiser has more than two of an answer's ads (`cap`), nobody is shown an ad twice
(`exclude`). When a campaign's budget is spent, its ads are written with `active: false`, and the
filter of the next request leaves them out.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from recipe import TIMEOUT_MS, Recipe, command

from shardline import Client, Seq

CATEGORIES = 16
KEYWORDS = 12  # per category
ADVERTISERS = 25
LARGEST_SHARE = 0.4  # of all ads are the largest advertiser's
CAMPAIGN_ADS = 5
CLICKS = 8  # per person and page
K = 10
PLACES = 5  # ads per page in the simulated day
PEOPLE = 40  # who look at pages that day
BUDGET = 15.0
ACTIVE: dict[str, Any] = {"active": True}
CAP: dict[str, Any] = {"cap": {"column": "advertiser", "max": 2}}
BOOST: dict[str, Any] = {"boost": {"column": "bid", "weight": 0.1}}
CONFIG = {
    "training": {
        "dim": 64,
        "epochs": 6,
        "batch_size": 512,
        "validation": {"k": K},
        "towers": {
            "query": {
                "features": [
                    {"kind": "categorical", "column": "page"},
                    {"kind": "multi_valued", "column": "interests"},
                ],
                "hidden": [64],
            },
            "item": {
                "features": [
                    {"kind": "categorical", "column": "category"},
                    {"kind": "multi_valued", "column": "keywords"},
                ],
                "hidden": [64],
            },
        },
    },
    "cluster": {"shards": 2},
}


@dataclass(frozen=True, slots=True)
class Ads:
    """By id: category, campaign, advertiser (n,) int64; bid (n,); keywords (n, 4) int64."""

    category: np.ndarray
    campaign: np.ndarray
    advertiser: np.ndarray
    bid: np.ndarray
    keywords: np.ndarray


@dataclass(frozen=True, slots=True)
class Visits:
    """A person who looks at a page: page (n,), a category; interests (n, 6) keywords, of the page's
    category and another one."""

    page: np.ndarray
    other: np.ndarray
    interests: np.ndarray

    def feature_maps(self, visits: np.ndarray) -> list[dict[str, Any]]:
        return [
            {"page": f"page {self.page[visit]}", "interests": named("word", self.interests[visit])}
            for visit in visits
        ]


def named(kind: str, numbers: np.ndarray) -> list[str]:
    return [f"{kind} {number}" for number in numbers.tolist()]


def keywords_of(categories: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(n, count) different keywords of each category."""
    order = rng.random((len(categories), KEYWORDS)).argsort(axis=1)[:, :count]
    return categories[:, None] * KEYWORDS + order


def make_ads(campaigns: int, rng: np.random.Generator) -> Ads:
    """A campaign has one advertiser, one category and one bid, and CAMPAIGN_ADS ads."""
    is_largest = rng.random(campaigns) < LARGEST_SHARE
    advertiser = np.where(is_largest, 0, rng.integers(1, ADVERTISERS, campaigns))
    category = rng.integers(0, CATEGORIES, campaigns)
    bid = np.round(rng.lognormal(0.0, 0.5, campaigns), 2)
    campaign = np.repeat(np.arange(campaigns), CAMPAIGN_ADS)
    return Ads(
        category=category[campaign],
        campaign=campaign,
        advertiser=advertiser[campaign],
        bid=bid[campaign],
        keywords=keywords_of(category[campaign], 4, rng),
    )


def make_visits(count: int, rng: np.random.Generator) -> Visits:
    page = rng.integers(0, CATEGORIES, count)
    other = (page + rng.integers(1, CATEGORIES, count)) % CATEGORIES
    interests = np.hstack([keywords_of(page, 3, rng), keywords_of(other, 3, rng)])
    return Visits(page, other, interests)


def make_clicks(ads: Ads, visits: Visits, rng: np.random.Generator) -> np.ndarray:
    """(n, CLICKS) different ads, the likelier the more keywords an ad shares with the interests."""
    clicks = []
    for interests in visits.interests:
        shared = np.isin(ads.keywords, interests).sum(axis=1)
        gumbel = rng.gumbel(size=len(shared))  # the largest of them: drawn in proportion to exp
        clicks.append(np.argpartition(-(3.0 * shared + gumbel), CLICKS)[:CLICKS])
    return np.array(clicks)


def ads_recipe(recipe: Recipe) -> None:
    """From clicks to a day of pages with ads, while campaigns spend their budgets."""
    rng = np.random.default_rng(2026)
    ads = make_ads(recipe.size(1200, 500), rng)
    visits = make_visits(recipe.size(4000, 1500), rng)
    clicks = make_clicks(ads, visits, rng)
    count = len(visits.page)
    recipe.write_tables(
        users=pa.table(
            {
                "user_id": np.arange(count),
                "page": named("page", visits.page),
                "interests": [named("word", row) for row in visits.interests],
            }
        ),
        items=pa.table(
            {
                "item_id": np.arange(len(ads.bid)),
                "category": named("category", ads.category),
                "keywords": [named("word", row) for row in ads.keywords],
                "campaign": ads.campaign,
                "advertiser": named("advertiser", ads.advertiser),
                "bid": ads.bid,
                "active": np.ones(len(ads.bid), np.bool_),
            }
        ),
        interactions=pa.table(
            {
                "user_id": np.repeat(np.arange(count), CLICKS),
                "item_id": clicks.ravel(),
                "timestamp": np.tile(np.arange(CLICKS), count),
            }
        ),
    )
    recipe.configure(CONFIG)
    recipe.build("--test-per-user", "0", "--val-users", "300")
    fresh = make_visits(200, rng)
    with recipe.served() as client:
        show_answers(recipe, client, ads, fresh)
        day = Day(client, ads)
        day.pages(rng, recipe.size(400, 120))
        show_day(recipe, day)


def show_answers(recipe: Recipe, client: Client, ads: Ads, visits: Visits) -> None:
    """Answers with one rule at a time beside plain ones."""

    def asked(**rules: Any) -> np.ndarray:
        """(n, K) ids of ads."""
        features = visits.feature_maps(np.arange(len(visits.page)))
        return client.search(features=features, k=K, timeout_ms=TIMEOUT_MS, **rules).ids

    def most_of_one(ids: np.ndarray) -> int:
        """The most ads that one advertiser has in an answer."""
        return max(int(np.bincount(row).max()) for row in ads.advertiser[ids])

    plain, capped = asked(), asked(**CAP)
    recipe.outcome("most ads of one advertiser in an answer of 10", ">= 6", most_of_one(plain))
    recipe.outcome("the same, with cap", "<= 2", most_of_one(capped))
    recipe.outcome("capped answers that have 10 ads", "= 100 %", (capped >= 0).all(axis=1).mean())
    about = np.stack([visits.page, visits.other], axis=1)
    fits = (ads.category[capped][:, :, None] == about[:, None, :]).any(axis=2)
    recipe.outcome("ads about the page or the person's interests", ">= 80 %", fits.mean())
    paid = asked(**CAP, **BOOST)
    gain = ads.bid[paid].mean() / ads.bid[capped].mean()
    recipe.outcome("mean bid with boost, as a multiple of that without", ">= 1.2", gain)


@dataclass
class Day:
    """Pages with ads for PEOPLE, one after the other; what every campaign has spent.

    seq: of the newest write, so that each page is asked for with it. late: ads that were shown
    after the page with which their campaign's budget was spent.
    """

    client: Client
    ads: Ads
    spent: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    shown: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    exhausted: list[int] = field(default_factory=list)
    late: int = 0
    seq: Seq | None = None

    def pages(self, rng: np.random.Generator, count: int) -> None:
        visits = make_visits(count, rng)
        for page in range(count):
            self.page(page % PEOPLE, visits.feature_maps(np.array([page])))

    def page(self, person: int, features: list[dict[str, Any]]) -> None:
        """Shows PLACES ads, and withdraws the campaigns that this has cost their budget."""
        answer = self.client.search(
            features=features,
            k=PLACES,
            filter=ACTIVE,
            exclude=[self.shown[person]],
            min_seq=self.seq,
            timeout_ms=TIMEOUT_MS,
            **CAP,
            **BOOST,
        )
        found = answer.ids[0].tolist()
        campaigns = self.ads.campaign[found].tolist()
        self.late += len(set(campaigns) & set(self.exhausted))
        self.shown[person] += found
        for ad, campaign in zip(found, campaigns, strict=True):
            self.spent[campaign] += self.ads.bid[ad]
        for campaign in sorted(set(campaigns)):
            if self.spent[campaign] >= BUDGET:
                self.write(campaign, active=False)
                self.exhausted.append(campaign)

    def write(self, campaign: int, *, active: bool) -> None:
        """Writes a campaign's ads as they are, but for one attribute: a write replaces an item."""
        items = [self.client.item(ad) for ad in self.ads_of(campaign)]
        names = items[0].attributes
        self.seq = self.client.upsert(
            item_ids=[item.item_id for item in items],
            vectors=np.array([item.vector for item in items]),
            attributes={
                **{name: [item.attributes[name] for item in items] for name in names},
                "active": [active] * len(items),
            },
        ).seq

    def ads_of(self, campaign: int) -> list[int]:
        return np.flatnonzero(self.ads.campaign == campaign).tolist()

    def is_served(self, campaign: int) -> bool:
        """Whether a request for the very vector of one of its ads has it."""
        first = self.ads_of(campaign)[0]
        vector = self.client.item(first).vector
        answer = self.client.search(
            vectors=vector[None], k=K, filter=ACTIVE, min_seq=self.seq, timeout_ms=TIMEOUT_MS
        )
        return first in answer.ids[0].tolist()


def show_day(recipe: Recipe, day: Day) -> None:
    twice = sum(len(ads) - len(set(ads)) for ads in day.shown.values())
    recipe.outcome("ads shown twice to one person", "= 0", twice)
    recipe.outcome("campaigns whose budget was spent", ">= 20", len(day.exhausted))
    recipe.outcome("their ads shown after that", "= 0", day.late)
    beyond = max(day.spent.values()) - BUDGET
    recipe.outcome(
        "most spent beyond a budget, in bids of the dearest", "<= 2", beyond / day.ads.bid.max()
    )
    again = day.exhausted[:10]
    recipe.outcome("of 10 exhausted campaigns, served", "= 0", sum(map(day.is_served, again)))
    for campaign in again:
        day.write(campaign, active=True)
    recipe.outcome("the same, with a new budget", "= 10", sum(map(day.is_served, again)))


if __name__ == "__main__":
    command(ads_recipe)()
