"""The features that a running cluster's query encoder takes. No torch here, so that ``batch`` runs
without it."""

from shardline.router.client.sync_client import Client
from shardline.shards.core.errors import EncoderUnavailable, InvalidInput


def encoder_kinds(client: Client) -> dict[str, str]:
    """Name and kind of each feature.

    Raises:
        InvalidInput: it serves imported vectors and has no encoder.
        EncoderUnavailable: its encoder did not load.
    """
    status = client.status()
    encoder = status["encoder"]
    for warning in status.get("warnings", ()):  # routers before these have none
        if warning["about"] == "query_encoder":
            raise EncoderUnavailable("the cluster's query encoder", got=warning["text"])
    if encoder is None:
        raise InvalidInput("this cluster serves imported vectors: it has no query encoder")
    return {feature["name"]: feature["kind"] for feature in encoder["features"]}
