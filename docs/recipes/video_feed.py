"""A video feed: what comes next, from what was watched; fresh, varied, and never the same again.

    python docs/recipes/video_feed.py

The query tower reads the watched videos, weighed by attention. One request then says the rest: what
was watched is not returned (`exclude_history`), a younger video is lifted (`boost`), and the feed
is not ten times the same (`diversify`). A video that is uploaded is in the next feed.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
from recipe import TIMEOUT_MS, Recipe, command

from shardline import Client

TOPICS = 20
CHANNELS = 240  # twelve per topic
TAGS = 12  # per topic
COUNTRIES = ["BR", "DE", "IN", "JP", "US"]
WATCHED = 20  # videos per viewer
OLDEST_DAYS = 365
K = 20
VIEWERS = 60  # asked for
COMPARED = 15  # of them, whose feeds are compared video by video
UPLOADS = 20
EXCLUDE: dict[str, Any] = {"exclude_history": True}
BOOST: dict[str, Any] = {"boost": {"column": "published_at", "weight": 0.3, "half_life_days": 30}}
DIVERSIFY: dict[str, Any] = {"diversify": {"lambda": 0.5, "pool": 200}}
CONFIG = {
    "training": {
        "dim": 64,
        "epochs": 6,
        "batch_size": 512,
        "validation": {"k": K},
        "towers": {
            "query": {
                "features": [
                    {"kind": "categorical", "column": "country"},
                    {"kind": "history", "pooling": "attention", "max_length": WATCHED},
                ],
                "hidden": [64],
            },
            "item": {
                "features": [
                    {"kind": "categorical", "column": "topic"},
                    {"kind": "categorical", "column": "channel", "dim": 32},
                    {"kind": "multi_valued", "column": "tags"},
                    {"kind": "numeric", "column": "minutes", "log": True},
                ],
                "hidden": [64],
            },
        },
    },
    "cluster": {"shards": 2},
}


@dataclass(frozen=True, slots=True)
class Videos:
    """By id: channel (n,), tags (n, 3) int64, minutes (n,), age_days (n,). A channel has one topic,
    and tags are of that topic."""

    channel: np.ndarray
    tags: np.ndarray
    minutes: np.ndarray
    age_days: np.ndarray

    @property
    def topic(self) -> np.ndarray:
        return self.channel % TOPICS


@dataclass(frozen=True, slots=True)
class Viewers:
    """countries (n,); channels (n, 3) of topics (n, 2) that each likes; watched (n, WATCHED) ids,
    oldest first."""

    countries: np.ndarray
    channels: np.ndarray
    topics: np.ndarray
    watched: np.ndarray

    def feature_maps(self, viewers: np.ndarray) -> list[dict[str, Any]]:
        return [
            {"country": str(self.countries[viewer]), "history": self.watched[viewer].tolist()}
            for viewer in viewers
        ]


def utc_now() -> datetime:
    """The time in UTC without a zone, as ``shardline data import`` keeps times."""
    return datetime.now(UTC).replace(tzinfo=None)


def make_videos(count: int, rng: np.random.Generator) -> Videos:
    channel = rng.integers(0, CHANNELS, count)
    return Videos(
        channel=channel,
        tags=tags_of(channel % TOPICS, rng),
        minutes=np.round(rng.lognormal(2.0, 0.7, count), 1),
        age_days=rng.uniform(0, OLDEST_DAYS, count),
    )


def tags_of(topics: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n, 3) different tags of each topic."""
    order = rng.random((len(topics), TAGS)).argsort(axis=1)[:, :3]
    return np.asarray(topics[:, None] * TAGS + order)


def make_viewers(count: int, videos: Videos, rng: np.random.Generator) -> Viewers:
    """A viewer likes three channels of two topics, and three tags of each topic."""
    topics = np.array([rng.choice(TOPICS, 2, replace=False) for _ in range(count)])
    of_topics = topics[:, [0, 0, 1]]
    channels = of_topics + TOPICS * rng.integers(0, CHANNELS // TOPICS, (count, 3))
    tags = np.hstack([tags_of(topic, rng) for topic in topics.T])
    liked = zip(channels, topics, tags, strict=True)
    return Viewers(
        countries=rng.choice(COUNTRIES, count),
        channels=channels,
        topics=topics,
        watched=np.array([watch(videos, *each, rng) for each in liked]),
    )


def watch(
    videos: Videos,
    channels: np.ndarray,
    topics: np.ndarray,
    tags: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """(WATCHED,) different videos: liked channels first, then liked topics, by their tags."""
    weights = np.full(len(videos.channel), 1e-4)
    weights[np.isin(videos.topic, topics)] = 0.05
    weights[np.isin(videos.channel, channels)] = 1.0
    weights *= 4.0 ** np.isin(videos.tags, tags).sum(axis=1)
    return rng.choice(len(weights), WATCHED, replace=False, p=weights / weights.sum())


def video_feed(recipe: Recipe) -> None:
    """From a log of what was watched to feeds, asked for with one rule at a time and with all."""
    rng = np.random.default_rng(2026)
    now = utc_now()
    videos = make_videos(recipe.size(6000, 3000), rng)
    viewers = make_viewers(recipe.size(4000, 1000), videos, rng)
    count, topics = len(viewers.watched), [f"topic {topic}" for topic in range(TOPICS)]
    recipe.write_tables(
        users=pa.table({"user_id": np.arange(count), "country": viewers.countries}),
        items=pa.table(
            {
                "item_id": np.arange(len(videos.channel)),
                "topic": [topics[topic] for topic in videos.topic],
                "channel": [f"channel {channel}" for channel in videos.channel],
                "tags": [[f"tag {tag}" for tag in tags] for tags in videos.tags],
                "minutes": videos.minutes,
                "published_at": [now - timedelta(days=age) for age in videos.age_days],
            }
        ),
        interactions=pa.table(
            {
                "user_id": np.repeat(np.arange(count), WATCHED),
                "item_id": viewers.watched.ravel(),
                "timestamp": np.tile(np.arange(WATCHED), count),
            }
        ),
    )
    recipe.configure(CONFIG)
    recipe.build("--test-per-user", "0", "--val-users", "500")
    with recipe.served() as client:
        asked = rng.choice(count, VIEWERS, replace=False)
        show_rules(recipe, client, videos, viewers, asked)
        show_uploads(recipe, client, videos, viewers, asked[:UPLOADS])


def show_rules(
    recipe: Recipe, client: Client, videos: Videos, viewers: Viewers, asked: np.ndarray
) -> None:
    """Feeds with one rule at a time beside plain ones, then with all rules."""

    def feeds(**rules: Any) -> np.ndarray:
        """(VIEWERS, K) ids of videos."""
        answer = client.search(
            features=viewers.feature_maps(asked), k=K, timeout_ms=TIMEOUT_MS, **rules
        )
        return answer.ids

    def seen(ids: np.ndarray) -> int:
        pairs = zip(ids, viewers.watched[asked], strict=True)
        return sum(len(np.intersect1d(row, watched)) for row, watched in pairs)

    def liked(ids: np.ndarray) -> float:
        topics = viewers.topics[asked]
        return float((videos.topic[ids][:, :, None] == topics[:, None, :]).any(axis=2).mean())

    plain, unseen = feeds(), feeds(**EXCLUDE)
    recipe.outcome("watched videos in all plain feeds", ">= 60", seen(plain))
    recipe.outcome("the same, with exclude_history", "= 0", seen(unseen))
    recipe.outcome("feeds that have 20 videos all the same", "= 100 %", (unseen >= 0).all(1).mean())
    recipe.outcome("videos of the two topics that a viewer likes", ">= 80 %", liked(unseen))

    fresh = feeds(**EXCLUDE, **BOOST)
    recipe.outcome("mean age of the videos in days", ">= 120", videos.age_days[unseen].mean())
    recipe.outcome("the same, with boost", "<= 60", videos.age_days[fresh].mean())

    varied = feeds(**EXCLUDE, **DIVERSIFY)
    before, after = (similarity(client, ids[:COMPARED]) for ids in (unseen, varied))
    recipe.outcome("mean similarity within a feed", ">= 0.6", before)
    recipe.outcome("the same with diversify, as a share of that", "<= 85 %", after / before)

    everything = feeds(**EXCLUDE, **BOOST, **DIVERSIFY)
    recipe.outcome("all rules: watched videos", "= 0", seen(everything))
    recipe.outcome("all rules: mean age in days", "<= 90", videos.age_days[everything].mean())
    recipe.outcome("all rules: videos of the two topics", ">= 60 %", liked(everything))


def similarity(client: Client, feeds: np.ndarray) -> float:
    """The mean cosine of two different videos of one feed, by the vectors that the shards store."""
    vectors = {item: client.item(item).vector for item in np.unique(feeds).tolist()}
    rows = np.array([[vectors[item] for item in feed] for feed in feeds.tolist()])
    cosines = rows @ rows.transpose(0, 2, 1)
    k = feeds.shape[1]
    return float((cosines.sum(axis=(1, 2)) - k).mean() / (k * (k - 1)))


def last_liked(videos: Videos, viewers: Viewers, viewer: int) -> int:
    """The video of a liked channel that was watched last."""
    watched = viewers.watched[viewer]
    return int(watched[np.isin(videos.channel[watched], viewers.channels[viewer])][-1])


def show_uploads(
    recipe: Recipe, client: Client, videos: Videos, viewers: Viewers, asked: np.ndarray
) -> None:
    """A channel that the viewer likes uploads a video like the one watched last: is it in the next
    feed?"""
    ids = len(videos.channel) + np.arange(len(asked))
    last = np.array([last_liked(videos, viewers, viewer) for viewer in asked.tolist()])
    written = client.upsert(
        item_ids=ids,
        features={
            "topic": [f"topic {topic}" for topic in videos.topic[last]],
            "channel": [f"channel {channel}" for channel in videos.channel[last]],
            "tags": [[f"tag {tag}" for tag in tags] for tags in videos.tags[last]],
            "minutes": [7.0] * len(ids),
        },
        attributes={"published_at": [utc_now()] * len(ids)},
    )
    answer = client.search(
        features=viewers.feature_maps(asked),
        k=K,
        min_seq=written.seq,
        timeout_ms=TIMEOUT_MS,
        **EXCLUDE,
        **BOOST,
        **DIVERSIFY,
    )
    found = (answer.ids == ids[:, None]).any(axis=1).sum()
    recipe.outcome("uploads of a liked channel in the viewer's next feed, of 20", ">= 18", found)


if __name__ == "__main__":
    command(video_feed)()
