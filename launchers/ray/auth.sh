#!/usr/bin/env bash
# Sourced by the launchers: head, workers and the run of a cluster share a secret. Whoever reaches the ports of a cluster without
# one can run code on it.
#
# RAY_AUTH_TOKEN       the secret itself; or
# RAY_AUTH_TOKEN_PATH  a file that holds it; or, without either, ~/.ray/auth_token, which is also where Ray's own commands look.
#                      head.sh makes that file if it is missing (TOKEN_MISSING=make), readable by its owner only. On machines that
#                      share home directories the workers find it; to others copy it, or export RAY_AUTH_TOKEN there.
# RAY_AUTH_MODE        `disabled` is the only way to do without a secret
set -euo pipefail

export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}" ]; then
  if [ -z "${RAY_AUTH_TOKEN_PATH:-}" ]; then
    export RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token
    # Ray's own command makes this file readable by everybody.
    [ ! -e "$RAY_AUTH_TOKEN_PATH" ] || chmod 600 "$RAY_AUTH_TOKEN_PATH"
  fi
  if [ -e "$RAY_AUTH_TOKEN_PATH" ] && [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
    echo "the secret of the Ray cluster is empty: remove $RAY_AUTH_TOKEN_PATH, and head.sh makes a new one" >&2
    exit 2
  fi
  if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
    if [ "${TOKEN_MISSING:-refuse}" != make ]; then
      echo "no secret of the Ray cluster: $RAY_AUTH_TOKEN_PATH is missing. Copy it from the machine that runs head.sh (mode 0600)," \
        "or export RAY_AUTH_TOKEN; RAY_AUTH_MODE=disabled only if the cluster was started with that" >&2
      exit 2
    fi
    mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
    new=$(mktemp "$RAY_AUTH_TOKEN_PATH.XXXXXX") # mktemp makes it readable by the owner only
    python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$new"
    # A hard link never replaces a file: of two heads that start at once, both use the secret of the first.
    ln "$new" "$RAY_AUTH_TOKEN_PATH" 2>/dev/null || true
    rm "$new"
    echo "made the secret of this Ray cluster: $RAY_AUTH_TOKEN_PATH (workers need the same file, or RAY_AUTH_TOKEN)" >&2
  fi
fi
