"""What a router replica and a shard do once they have loaded all that stays, before they serve."""

import gc

from shardline.shards.process.huge_pages import use_huge_pages


def prepare_memory() -> None:
    """Takes what is loaded out of garbage collection, and into huge pages; some hundred ms."""
    gc.collect()
    gc.freeze()  # a full collection over Ray and all the rest takes 50 ms
    use_huge_pages()
