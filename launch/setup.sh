#!/usr/bin/env bash
# Create .venv with the build of JAX for this machine; later calls return at once.
#   bash launch/setup.sh [extra ...]      extras of pyproject.toml in addition to the accelerator's, such as "test"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

accelerator() {
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then echo cuda
  elif [ -e /dev/accel0 ] || [ -n "${TPU_NAME:-}" ] || ls /dev/vfio/[0-9]* >/dev/null 2>&1; then echo tpu
  fi
}

python_of_this_machine() {
  for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  # The images of TPU VMs have 3.10; uv brings a newer one without root.
  if command -v uv >/dev/null 2>&1; then
    uv python install --quiet 3.12 && uv python find 3.12
    return
  fi
  echo "ig_jax: error: Python 3.11 or newer was not found; install it or uv, or set PYTHON=/path/to/python" >&2
  return 2
}

extras=$(echo "$(accelerator)" "$@" | tr ' ' '\n' | sort -u | grep . | paste -sd, || true)
wanted=$(cksum < pyproject.toml)
stamp=.venv/ig_jax-installed-${extras:-base}
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  python=$(python_of_this_machine)
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  echo "installing ig_jax${extras:+[$extras]} into .venv (once)"
  # Python compiles what it imports; pip would compile every file of torch and TensorFlow.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -e ".${extras:+[$extras]}"
  echo "$wanted" > "$stamp"
fi
