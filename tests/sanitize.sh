#!/usr/bin/env bash
# Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs their tests and the fuzz test.
# Needs the dev extra in the active environment and gcc. Usage: bash tests/sanitize.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(mktemp -d)
trap 'rm -rf "$target"' EXIT
PYPRUNE_SANITIZE=1 PYPRUNE_CUDA_ARCHS=off pip install --quiet --no-build-isolation --no-deps --target "$target" .

# Python itself is not instrumented, so the runtime comes first; its own and torch's leaks at exit are not ours.
LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so)"
export LD_PRELOAD PYTHONPATH="$target${PYTHONPATH:+:$PYTHONPATH}"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
(cd / && python -c "import sys, pyprune._C as C; sys.exit(not C.__file__.startswith('$target'))")
# The script, not python -m: that would put the source tree, with its uninstrumented module, first.
# -s: a finding ends the process, and with it what pytest would have captured.
pytest -q -s -p no:cacheprovider tests/ops/test_native.py tests/ops/test_fuzz_ops.py "$@"
