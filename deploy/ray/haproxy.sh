#!/bin/sh
# What RAY_SERVE_HAPROXY_BINARY_PATH names on a launched cluster; router/serve/haproxy_start.py says why.
root=$(cd "$(dirname "$0")/../.." && pwd)
# router.max_in_flight, .retry_after_s, .max_timeout_ms and .body_timeout_ms, and cluster.insecure: if
# cluster-config.yaml sets one of them, set the same here
limits='{"max_in_flight": 128, "retry_after_s": 1, "max_timeout_ms": 10000, "body_timeout_ms": 10000, "insecure": false}'
exec "$root/.venv/bin/python" -I "$root/shardline/router/serve/haproxy_start.py" "$limits" "$@"
