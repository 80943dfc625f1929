# On a head, after `ray start`: Ray's dashboard and its agent, which carry the job server, get processor time that nobody
# else wants. While the GCS is away they ask for it without a pause (Ray 2.60), one core each; searches go on meanwhile,
# and must not wait for that. Gives up after 20 s; nothing but that priority depends on it.
user=$(id -u)
# by how they are called: the raylet's command names the agent, too, and the shards are its children
theirs='^(ray-dashboard|ray::DashboardAgent|[^ ]*python[0-9.]* (-u )?[^ ]*/ray/dashboard/)'
for _ in $(seq 40); do
  pgrep -u "$user" -f '/ray/dashboard/dashboard.py' || break
  for pid in $(pgrep -u "$user" -f "$theirs"); do
    for thread in /proc/"$pid"/task/*; do
      renice -n 19 -p "${thread##*/}"
    done
  done
  # the module that asks the most begins last; without a dashboard there is none
  pgrep -u "$user" -f 'ray-dashboard-NodeHead|dashboard.py .*--modules-to-load' && break
  sleep 0.5
done > /dev/null 2>&1
