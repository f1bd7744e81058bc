#!/usr/bin/env bash
# Sets up the environment with the test extra and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh test
# Two at a time: most of a test is compilation, which uses one core.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
