#!/usr/bin/env bash
# On a machine with a GPU, from the root of the repository: ten minutes at most. The results are copied to the folder
# given, as they are when the time is over: `performance-gpu-*.json` belongs into benchmarks/results, and
# `python -m benchmarks.performance --write-pages` puts it into the pages.
#   benchmarks/performance/gpu.sh FOLDER        the benchmark's parts for a GPU, then tests
set -uo pipefail
cd "$(dirname "$0")/../.."
folder=${1:?the folder for the results}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 JAX_PLATFORMS=cuda
timeout 420 python3 -m benchmarks.performance --gpu --minutes 6 2>&1 | tee "$folder/performance.log"
cp benchmarks/results/performance-gpu-*.json "$folder"
# What the tests compile quickly on a CPU is compiled here as users do; eight devices are not at hand.
export XLA_PYTHON_CLIENT_PREALLOCATE=false COMPILER=users
timeout -s INT -k 10 150 python3 -m pytest -o addopts= -W default -q -p no:cacheprovider -n 12 -m "not slow" \
    --continue-on-collection-errors -rf --tb=short \
    tests/guard/test_guard.py tests/conformance/test_edge_cases.py tests/conformance/test_dtypes.py \
    tests/conformance/test_jax_transformations.py tests/conformance/test_fidelity.py 2>&1 | tee "$folder/tests.log" | tail -60
