#!/usr/bin/env bash
# Joins this machine to the Ray cluster at ADDRESS and stays in the foreground; SIGTERM stops the node and all its processes.
#
# ADDRESS       HOST:PORT of the head (required); waited for up to WAIT seconds (120)
# NODE_IP       address that the other nodes reach this one at; by default the one this machine uses towards the head
# CPUS, GPUS, RESOURCES, OBJECT_STORE_MIB, WORKER_PORTS   as for head.sh
# RAY_AUTH_TOKEN  secret of the cluster; by default in ~/.ray/auth_token, see auth.sh
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit ;; esac
source "$(dirname "$0")/auth.sh"

: "${ADDRESS:?set ADDRESS to HOST:PORT of the head}"
host=${ADDRESS%:*}
port=${ADDRESS##*:}

deadline=$((SECONDS + ${WAIT:-120}))
until (exec 3<>"/dev/tcp/$host/$port") 2>/dev/null; do
  if [ $SECONDS -ge $deadline ]; then echo "worker: nothing listens at $ADDRESS after ${WAIT:-120} s" >&2; exit 1; fi
  sleep 1
done

# A machine may have many addresses. Asking the kernel for its route to the head finds the one that is on the same network.
towards='import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect((sys.argv[1], 9))
print(s.getsockname()[0])'

ports=${WORKER_PORTS:-0-0}  # 0: the operating system chooses, so that nodes on one machine never collide
flags=(--address="$ADDRESS" --dashboard-agent-listen-port=0 --node-ip-address="${NODE_IP:-$(python -c "$towards" "$host")}")
flags+=(--resources="${RESOURCES:-"{}"}" --object-store-memory=$((${OBJECT_STORE_MIB:-256} << 20)))
flags+=(--min-worker-port="${ports%%-*}" --max-worker-port="${ports##*-}")
[ -z "${CPUS:-}" ] || flags+=(--num-cpus="$CPUS")
[ -z "${GPUS:-}" ] || flags+=(--num-gpus="$GPUS")

# Engine and learner are the work. Ray gives its workers 15, with which whatever else computes on the machine goes before them.
export RAY_worker_niceness=${RAY_worker_niceness:-0}
# Ray starts a worker for each core beforehand. Our actors have environments of their own and take none of those.
export RAY_prestart_worker_first_driver=${RAY_prestart_worker_first_driver:-0}

exec ray start --block --disable-usage-stats "${flags[@]}"
