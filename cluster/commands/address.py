"""Address and key for requests to a cluster: from options, else from the store's note."""

from pathlib import Path

import click

from shardline.cluster.cli import Settings
from shardline.cluster.serving.endpoint import Address, find_endpoint
from shardline.cluster.serving.serving_keys import client_key
from shardline.shards.core.errors import NotFound, Unavailable

key_file_option = click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    help="File with the API key.  [default: $SHARDLINE_API_KEY; else, without --url, the store's]",
)


def address_of(settings: Settings, url: str | None, key_file: Path | None) -> Address:
    """The cluster at ``url``, or the one that serves the store when None.

    The store's own key goes to the store's own cluster only, never to an address given by --url.

    Raises:
        Unavailable: no cluster serves the store. NotFound: there is no such key file.
        ConfigError: the key file is not safe, or holds no key.
    """
    key = client_key(key_file)
    if url is not None:
        return Address(url, key)
    try:
        endpoint = find_endpoint(settings.store)
    except NotFound as error:
        raise Unavailable(error.message, hint=error.hint) from error
    return endpoint.address if key is None else Address(endpoint.url, key)
