# Sourced by the launchers: whether a cluster asks for a token must be the same for its head, its workers and the run.
# Left to itself, Ray decides by whether some file happens to lie in the home directory, which differs from node to node.
#
# RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH)   a secret that all share: `python -c 'import secrets; print(secrets.token_hex(32))'`
# Without one, whoever reaches the ports can run code.
set -euo pipefail

if [ -z "${RAY_AUTH_MODE:-}" ]; then
  if [ -n "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ]; then RAY_AUTH_MODE=token; else RAY_AUTH_MODE=disabled; fi
fi
export RAY_AUTH_MODE
