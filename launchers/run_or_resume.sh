#!/usr/bin/env bash
# Runs a configuration on the Ray cluster this machine belongs to; if the run exists already, resumes it. So one and the same
# command is right the first time and after every restart. Every launcher ends in this.
#
#   CONFIG=configs/quickstart.yaml launchers/run_or_resume.sh [key=value ...]
#
# CONFIG   the configuration file (required)
# RUN      the run directory; by default the configuration's own, runs/NAME. Every restart must see the same directory.
# ADDRESS  the Ray cluster, HOST:PORT; by default `auto`
# RAY_AUTH_TOKEN  its shared secret, if it has one (launchers/ray/auth.sh)
set -euo pipefail
source "$(dirname "$0")/ray/auth.sh"

: "${CONFIG:?set CONFIG to a configuration file}"
address=cluster.address=${ADDRESS:-auto}

if [ -n "${RUN:-}" ]; then
  place=("runs=$(dirname "$RUN")" "name=$(basename "$RUN")")
else
  place=()
  RUN=$(python -c 'import sys; from onlinerl import config; print(config.load(sys.argv[1], sys.argv[2:]).directory)' "$CONFIG" "$@")
fi

# exec: signals reach onlinerl itself, which stops resumably on SIGTERM.
if [ -f "$RUN/manifest.json" ]; then
  exec onlinerl resume --finished-ok "$RUN" "$address" "$@"
else
  exec onlinerl run "$CONFIG" "${place[@]}" "$address" "$@"
fi
