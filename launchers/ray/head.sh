#!/usr/bin/env bash
# Starts the head node of a Ray cluster and stays in the foreground; SIGTERM stops the node and all its processes.
#
# NODE_IP       address that the other nodes reach this one at; by default the first of `hostname -I`
# PORT          port of the cluster's address (6379); the two after it are Ray's, too
# CPUS, GPUS    how many to offer; by default all that Ray finds
# RESOURCES     JSON of extra resources, by which a configuration chooses nodes: '{"learner_node": 1}'
# OBJECT_STORE_MIB  shared memory for Ray's object store (256; weights do not travel through it)
# WORKER_PORTS  LOW-HIGH for Ray's workers behind a firewall; by default any free port
# RAY_AUTH_TOKEN  secret of the cluster; by default ~/.ray/auth_token, made if it is missing, see auth.sh
# TEMP_DIR      where Ray keeps sockets and logs; by default /tmp/ray
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit ;; esac
TOKEN_MISSING=make
source "$(dirname "$0")/auth.sh"

ports=${WORKER_PORTS:-0-0}  # 0: the operating system chooses, so that nodes on one machine never collide
port=${PORT:-6379}
# Ray's other fixed ports follow the first, so that two clusters on one machine need only differ in PORT.
flags=(--port="$port" --ray-client-server-port=$((port + 1)) --dashboard-port=$((port + 2)) --dashboard-agent-listen-port=0)
flags+=(--node-ip-address="${NODE_IP:-$(hostname -I | cut -d' ' -f1)}")
flags+=(--resources="${RESOURCES:-"{}"}" --object-store-memory=$((${OBJECT_STORE_MIB:-256} << 20)))
flags+=(--min-worker-port="${ports%%-*}" --max-worker-port="${ports##*-}")
[ -z "${CPUS:-}" ] || flags+=(--num-cpus="$CPUS")
[ -z "${GPUS:-}" ] || flags+=(--num-gpus="$GPUS")
[ -z "${TEMP_DIR:-}" ] || flags+=(--temp-dir="$TEMP_DIR")

# Engine and learner are the work. Ray gives its workers 15, with which whatever else computes on the machine goes before them.
export RAY_worker_niceness=${RAY_worker_niceness:-0}
# Ray starts a worker for each core beforehand. Our actors have environments of their own and take none of those.
export RAY_prestart_worker_first_driver=${RAY_prestart_worker_first_driver:-0}

exec ray start --head --block --include-dashboard=false --disable-usage-stats "${flags[@]}"
