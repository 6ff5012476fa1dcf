#!/usr/bin/env bash
# Runs a configuration on the Ray cluster this machine belongs to; if the run exists already, resumes it. So one and the same
# command is right the first time and after every restart. Every launcher ends in this.
#
#   CONFIG=configs/quickstart.yaml launchers/run_or_resume.sh [key=value ...]
#
# CONFIG   the configuration file (required)
# RUN      the run directory; by default the configuration's own, runs/NAME. Every restart must see the same directory.
# ADDRESS  the Ray cluster, HOST:PORT; by default `auto`
# METRICS_HOST    address to serve figures for Prometheus on (metrics.prometheus_host); by default the configuration's
# RAY_AUTH_TOKEN  secret of the cluster; by default in ~/.ray/auth_token, see launchers/ray/auth.sh
#
# Its exit code is that of onlinerl: 0 finished, 1 failed on the way, 2 refused before anything was started, 75 stopped resumably by a
# signal or by the loss of a learner rank. launchers/slurm/README.md says which of them are worth a restart.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit ;; esac
source "$(dirname "$0")/ray/auth.sh"

: "${CONFIG:?set CONFIG to a configuration file}"
given=("cluster.address=${ADDRESS:-auto}")
[ -z "${METRICS_HOST:-}" ] || given+=("metrics.prometheus_host=$METRICS_HOST")

# A run called 123 is called "123": values of key=value are YAML, which would read a number.
text() { python -c 'import json, sys; print(json.dumps(sys.argv[1], ensure_ascii=False))' "$1"; }

if [ -n "${RUN:-}" ]; then
  place=("runs=$(text "$(dirname "$RUN")")" "name=$(text "$(basename "$RUN")")")
else
  place=()
  # A configuration that cannot be read is refused as `onlinerl` would refuse it: nothing is gained by trying again.
  where='import sys
from onlinerl import config, errors
try:
    print(config.load(sys.argv[1], sys.argv[2:]).directory)
except errors.OnlineRLError as error:
    sys.stderr.write(f"error: {error.boundary}: {error}\n")
    sys.exit(2)'
  RUN=$(python -c "$where" "$CONFIG" "$@")
fi

# exec: signals reach onlinerl itself, which stops resumably on SIGTERM.
if [ -f "$RUN/manifest.json" ]; then
  exec onlinerl resume --finished-ok "$RUN" "${given[@]}" "$@"
else
  exec onlinerl run "$CONFIG" "${place[@]}" "${given[@]}" "$@"
fi
