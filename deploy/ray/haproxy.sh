#!/bin/sh
# What RAY_SERVE_HAPROXY_BINARY_PATH names on a launched cluster; router/serve/haproxy.py says why.
root=$(cd "$(dirname "$0")/../.." && pwd)
# router.max_in_flight and router.retry_after_s: if cluster-config.yaml sets them, set the same here
max_in_flight=128
retry_after_s=1
exec "$root/.venv/bin/python" -I "$root/router/serve/haproxy.py" $max_in_flight $retry_after_s "$@"
