#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under ten minutes: build, GPU tests of both kernel back-ends, benchmarks.
# Results (JSON, log.txt, JUnit reports) go to $OUT, default benchmarks/results/gpu. Needs torch with CUDA, Triton and, for
# the CUDA back-end, nvcc; downloads nothing. A failed step is noted and the next one runs; exit status 1 if any failed.
set -u
cd "$(dirname "$0")/.."
export OUT="${OUT:-$PWD/benchmarks/results/gpu}" PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
mkdir -p "$OUT"
log=$OUT/log.txt
: > "$log"
summary=""
failed=0

step() {  # name, seconds it may take, command...
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    echo "== $name" | tee -a "$log"
    timeout "$limit" "$@" >> "$log" 2>&1 || status=$?
    summary+="$name: status $status, $((SECONDS - start)) s"$'\n'
    if [ "$status" != 0 ]; then
        tail -n 25 "$log"
        failed=1
    fi
    return "$status"
}

step device 10 nvidia-smi
# without a compiler, or if the build fails, the Triton half still runs on the sources as they lie
if ! PYPRUNE_CUDA_ARCHS="${PYPRUNE_CUDA_ARCHS:-native}" step build 80 "$python" -m pip install -q --no-deps \
        --no-build-isolation -e .; then
    ln -s ../triton_kernels pyprune/triton_kernels && trap 'rm -f pyprune/triton_kernels' EXIT
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
step run_tests 60 "$python" -m pytest -q --junitxml="$OUT/run_tests.xml" tests/pipeline/test_gpu_end_to_end.py
step triton_tests 150 "$python" -m pytest -q --junitxml="$OUT/triton_tests.xml" tests/ops/test_triton_gpu.py
step triton_bench 100 "$python" benchmarks/bench_kernels_gpu.py --junit "$OUT/triton_tests.xml"
# no figure over a red test
step cuda_tests 90 "$python" -m pytest -q --junitxml="$OUT/cuda_tests.xml" tests/ops/test_cuda_gpu.py &&
    step cuda_bench 90 "$python" benchmarks/cuda_kernels.py --untested
printf "%s" "$summary" | tee -a "$log"
exit $failed
