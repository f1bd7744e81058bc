#!/usr/bin/env bash
# Tests the core rooms with the newest Python and the newest versions of everything, in .venv-newest.
#   bash launch/newest.sh [pytest arguments]
# PYTHON_NEWEST chooses the interpreter; without one of 3.12 or newer it says so and does nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

newest_python() {
  for candidate in "${PYTHON_NEWEST:-}" python3.13 python3.12 "$HOME"/.pyenv/versions/3.1[23]*/bin/python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

if ! python=$(newest_python); then
  echo "newest.sh: skipped, no Python 3.12 or newer on this machine; set PYTHON_NEWEST=/path/to/python"
  exit 0
fi
[ -x .venv-newest/bin/python ] || "$python" -m venv .venv-newest
.venv-newest/bin/python -c '
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"], *project["optional-dependencies"]["test"], sep="\n")' > .venv-newest/requirements.txt
.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --upgrade --upgrade-strategy eager \
  -r .venv-newest/requirements.txt
.venv-newest/bin/python -c 'import sys, jax, flax; print("Python", sys.version.split()[0], "JAX", jax.__version__, "Flax", flax.__version__)'
export PYTHONPATH=$PWD
unset PYTHONDONTWRITEBYTECODE # as in test.sh
# Without runs in several processes and whole runs, which take minutes and are about files and signals rather than JAX.
ignored=()
for name in guard held_out hooks hosts latents previews retrofit; do ignored+=("--ignore=tests/training/test_$name.py"); done
exec .venv-newest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${ignored[@]}" \
  tests/models tests/diffusion tests/optim tests/training tests/checkpoints "$@"
