#!/usr/bin/env bash
# Creates .venv with exactly the locked packages and onlinerl itself (editable). A second call does nothing.
#
#   requirements/install.sh          what the CPU product runs on
#   requirements/install.sh dev      and what tests and checks need
#
# PYTHON=/path/to/python chooses the interpreter; by default the first of 3.11, 3.12 and 3.13 that is found.
set -euo pipefail
cd "$(dirname "$0")/.."

kind=${1:-cpu}
torch=2.13.0
locks=(requirements/cpu.txt)
case $kind in
  cpu) ;;
  dev) locks+=(requirements/dev.txt) ;;
  *) echo "usage: $0 [cpu|dev]" >&2; exit 2 ;;
esac

fail() { printf 'install: %s\n' "$@" >&2; exit 1; }
step() { printf 'install: %s\n' "$*"; }

supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

find_python() {
  local candidate
  # Found is not enough: version managers leave shims behind that only print an error.
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c "$supported" 2>/dev/null; then command -v "$candidate"; return; fi
  done
  return 1
}

# ---- a virtual environment that works
venv=.venv
python=$venv/bin/python
if ! "$python" -c "$supported" 2>/dev/null; then
  base=$(find_python) || fail "no Python 3.11, 3.12 or 3.13 found${PYTHON:+ at $PYTHON}." \
    "Install one (Debian, Ubuntu: apt-get install python3 python3-venv) or name it: PYTHON=/path/to/python3.11"
  "$base" -c 'import venv, ensurepip' 2>/dev/null || fail "$base has no venv module." \
    "Install it (Debian, Ubuntu: apt-get install python3-venv), then run this again."
  [ ! -e $venv ] || [ -f $venv/pyvenv.cfg ] || fail "$venv exists but is no virtual environment: move it away."
  step "virtual environment from $base"
  rm -rf $venv
  "$base" -m venv $venv
fi

# vLLM and PyTorch compile kernels on first use.
command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null ||
  fail "no C compiler found." "Install one (Debian, Ubuntu: apt-get install build-essential), then run this again."

# ---- is it done already?
# The path is part of the key because an editable install points to it.
digest() {
  { pwd; "$python" -V; cat "$@" requirements/install.sh pyproject.toml; } |
    "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}
stamp=$venv/.installed-$kind
now=$(digest "${locks[@]}")
if [ "$(cat "$stamp" 2>/dev/null)" = "$now" ]; then exit 0; fi
rm -f "$stamp"

# pip remarks on every package that one of several configured directories lacks; errors still go through.
pip() {
  "$python" -m pip --disable-pip-version-check --quiet "$@" \
    2> >(grep --line-buffered -v -e "^WARNING: Location '.*' is ignored" >&2 || true)
}

# ---- PyTorch, built for CPU
# The package index gives Linux the CUDA build: gigabytes that a CPU cannot use. So look before fetching.
offered_build() {
  pip install --dry-run --ignore-installed --no-deps --report - "torch==$torch" | "$python" -c '
import json, sys
version = json.load(sys.stdin)["install"][0]["metadata"]["version"]
print("cpu" if version.endswith("+cpu") or sys.platform != "linux" else "cuda")'
}

if [ "$("$python" -c 'import importlib.metadata as m; print(m.version("torch").split("+")[0])' 2>/dev/null)" != "$torch" ]; then
  if [ "$(offered_build || echo none)" = cpu ]; then
    step "torch $torch (CPU build)"
    pip install --no-deps "torch==$torch"
  else
    step "torch $torch (CPU build, from PyTorch's own index)"
    # uv knows where that index is, and asks it for this one package only.
    if ! { pip install uv && "$venv/bin/uv" pip install --quiet --python "$python" --no-deps --torch-backend=cpu "torch==$torch"; }; then
      step "PyTorch's own index cannot be reached: taking the CUDA build, which is several GB but works on a CPU, too"
      pip install "torch==$torch"
    fi
  fi
fi

# ---- everything else, exactly as locked
step "$(grep -c == requirements/cpu.txt) packages of requirements/cpu.txt (a few minutes)"
# One package (deepspeed) is built on the spot, also with the locked setuptools. Older pips read the first name, newer the second.
export PIP_CONSTRAINT=$PWD/requirements/cpu.txt PIP_BUILD_CONSTRAINT=$PWD/requirements/cpu.txt
pip install --no-deps -r requirements/cpu.txt
if [ "$kind" = dev ]; then
  step "$(grep -c == requirements/dev.txt) packages of requirements/dev.txt"
  pip install --no-deps -r requirements/dev.txt
fi

unset PIP_CONSTRAINT PIP_BUILD_CONSTRAINT
step "onlinerl (editable)"
pip install --no-deps --no-build-isolation -e .

digest requirements/cpu.txt > $venv/.installed-cpu  # dev includes it
printf '%s\n' "$now" > "$stamp"
step "done: $venv"
