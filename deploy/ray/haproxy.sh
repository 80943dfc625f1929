#!/bin/sh
# What RAY_SERVE_HAPROXY_BINARY_PATH names on a launched cluster; router/serve/haproxy.py says why.
root=$(cd "$(dirname "$0")/../.." && pwd)
exec "$root/.venv/bin/python" -I "$root/router/serve/haproxy.py" "$@"
