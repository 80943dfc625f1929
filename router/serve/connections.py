"""How many connections HAProxy can hold with the open files that a process may have here.

HAProxy 2.8 counts at its start what it may need, and does not start if that is more than the hard
limit (`ulimit -Hn`). Nothing here needs Ray.
"""

DEFAULT_CONNECTIONS = 4096  # Ray's own
# Listeners, pollers, the admin socket, a health check per router: 28 with two routers. 64 routers
# are the most that a configuration can ask for.
OTHER_FILES = 128


def files_for(connections: int) -> int:
    """Open files for so many connections: both ends of each, and a pipe, which is two files, for
    every fourth, because Ray's configuration lets the kernel forward bodies (``option splice-*``).
    """
    return 2 * connections + 2 * (connections // 4) + OTHER_FILES


def connections_within(limit: int, wanted: int) -> int:
    """As many connections as ``limit`` open files allow, at most ``wanted``; may be 0."""
    fours, files = divmod(max(0, limit - OTHER_FILES), files_for(4) - OTHER_FILES)
    return min(wanted, 4 * fours + min(3, files // 2))


def wanted_connections(in_flight: int) -> int:
    """Connections for routers that work on ``in_flight`` requests at once, all together.

    As many again are for those who get 429: without a connection they would wait unanswered.
    """
    return max(DEFAULT_CONNECTIONS, fewest_connections(in_flight))


def fewest_connections(in_flight: int) -> int:
    """Below this, HAProxy would leave clients waiting that it should refuse with 429."""
    return 2 * in_flight
