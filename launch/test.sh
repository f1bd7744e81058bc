#!/usr/bin/env bash
# Set up the environment with the test extra and run the tests; arguments are passed to pytest.
#   bash launch/test.sh [--extra=NAME ...] [pytest arguments]
#   --extra=tpu    adds the TPU compiler (0.4 GB) and the tests that compile for a TPU slice
#   --extra=cuda   adds the GPU compiler and cuDNN (5.5 GB) and the same tests for GPU boxes
#   --extra=torch  adds PyTorch and diffusers, and the tests that read and write weights with them
#   --extra=buckets  adds object stores on this machine, and the tests of gs:// and s3://
#   IG_JAX_SLOW=1  also runs the long ones: frozen processes, random faults, every mesh, network and config there is
#   IG_JAX_FULL_SIZE=1 also compiles the XL networks for 256 chips and 8 GPUs, which takes hours
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=(test)
while [[ "${1:-}" == --extra=* ]]; do
  extras+=("${1#--extra=}")
  shift
done
bash launch/setup.sh "${extras[@]}"
unset PYTHONDONTWRITEBYTECODE # hundreds of processes import the same modules, which takes three seconds uncompiled
# Two at a time: most of a test is compilation, which uses one core.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
