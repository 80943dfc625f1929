# What every Ray process of a launched cluster must find in its environment before `ray start`. Why, says
# the table SERVING and LAUNCHED in router/serve/environment.py, which a test compares with this file.
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
export RAY_worker_niceness=0

export RAY_SERVE_ENABLE_HA_PROXY=1
export RAY_SERVE_HAPROXY_BINARY_PATH="$HOME/shardline/deploy/ray/haproxy.sh"
export RAY_SERVE_HAPROXY_METRICS_ENABLED=0
export RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S=30
export RAY_SERVE_HAPROXY_TUNE_BUFSIZE=40960
export RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER=1s
export RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL=3
export RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=1
export RAY_SERVE_SLOW_STARTUP_WARNING_S=600
export RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=1
export RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0
export RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0
export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=shardline.router.serve.front:middleware

# a silent host counts as dead after 12 s; hosts serve on for 600 s without the head
export RAY_health_check_period_ms=1000
export RAY_health_check_timeout_ms=2000
export RAY_health_check_failure_threshold=3
export RAY_gcs_rpc_server_reconnect_timeout_s=600
