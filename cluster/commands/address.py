"""Address and key for requests to a cluster: from options, from the store's note on a private Ray,
or from the controller of a launched cluster."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardline.cluster.cli import Settings
from shardline.cluster.serving.endpoint import Address, find_endpoint
from shardline.cluster.serving.serving_keys import client_key
from shardline.router.http.api_keys import Scope
from shardline.shards.core.errors import NotFound, Unavailable

if TYPE_CHECKING:
    from shardline.cluster.serving.launched import Launched

key_file_option = click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    help="File with the API key.  [default: $SHARDLINE_API_KEY; else, without --url, the store's]",
)


def address_of(
    settings: Settings,
    url: str | None,
    key_file: Path | None,
    launched: "Launched | None" = None,
    scope: Scope = Scope.SEARCH,
) -> Address:
    """The cluster at ``url``; when None, the one that serves the store, which with a
    ``cluster.address`` is found through Ray: the router of this host, or else another.

    launched: what ``launched_of`` has found already, where it was asked. scope: what the key is to
    be good for.

    The store's own key goes to the store's own cluster only, never to an address given by --url.

    Raises:
        Unavailable: no cluster serves the store, or no router of it can be connected to.
        NotFound: there is no such key file. ConfigError: it is not safe, or holds no key.
    """
    key = client_key(key_file, scope=scope)
    if url is not None:
        return Address(url, key)
    launched = launched or launched_of(settings, url)
    if launched is not None:
        return _address_in(launched, settings, key, scope)
    try:
        endpoint = find_endpoint(settings.store)
    except NotFound as error:
        raise Unavailable(error.message, hint=error.hint) from error
    return endpoint.address_for(scope) if key is None else Address(endpoint.url, key)


def launched_of(settings: Settings, url: str | None) -> "Launched | None":
    """The launched cluster that the configuration names; None: it names none, or a URL does.

    Raises:
        ConfigError, Unavailable: it cannot be found.
    """
    address = settings.config.cluster.address
    if url is not None or address == "local":
        return None
    from shardline.cluster.serving.launched import find_launched  # takes a second, for Ray

    return find_launched(address, verbose=settings.verbose)


def _address_in(launched: "Launched", settings: Settings, key: str | None, scope: Scope) -> Address:
    """A router of the cluster that can be connected to. key None: the store's.

    Raises:
        Unavailable: there is none. ConfigError: the key file is not to be used.
    """
    from shardline.cluster.serving.launched import first_answering, launched_key

    return Address(first_answering(launched.urls), key or launched_key(settings.config, scope))
