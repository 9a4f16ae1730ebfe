#!/usr/bin/env bash
# Everything that needs a GPU, the most valuable truth first, in two parts of under ten minutes each:
#
#   benchmarks/gpu_run.sh 1            ceilings, every op on every back-end, one LLaMA-2-7B-shaped block, speed of the ops
#   benchmarks/gpu_run.sh 2            CUDA tests, Triton tests spread over the cores, sanitizers, whole runs
#   benchmarks/gpu_run.sh              both
#   benchmarks/gpu_run.sh --rehearse   the same steps at tiny shapes on a CPU, in under a minute
#
# Results (JSON, log.txt, JUnit reports) go to $OUT, default benchmarks/results/gpu, each step's as soon as it has them.
# Needs torch with CUDA and Triton; nvcc for the CUDA half; neither network nor git. A failed step is noted and the next
# one runs; exit status 1 if any failed.
set -u
cd "$(dirname "$0")/.."
what="${1:-all}"
export OUT="${OUT:-$PWD/benchmarks/results/gpu}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
python="${PYTHON:-python3}"
mkdir -p "$OUT"
log=$OUT/log.txt
: >> "$log"
summary=""
failed=0

step() {  # name, seconds it may take, command...
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    echo "== $name" | tee -a "$log"
    timeout -k 5 "$limit" "$@" >> "$log" 2>&1 || status=$?
    summary+="$name: status $status, $((SECONDS - start)) s"$'\n'
    if [ "$status" != 0 ]; then
        tail -n 25 "$log"
        failed=1
    fi
    return "$status"
}


rehearse() {
    step ceilings 100 "$python" -m benchmarks study first_contact ceilings --device cpu
    step smoke 200 env TRITON_INTERPRET=1 "$python" -m benchmarks study first_contact smoke --device cpu --only nm_mask
    step block 200 "$python" -m benchmarks study first_contact block --device cpu --backends auto,reference
    step tests 300 "$python" -m benchmarks study first_contact tests --file tests/test_config.py --name some_tests --processes 1
    step ops 200 env TRITON_INTERPRET=1 "$python" -m benchmarks run ops --device cpu --preset smoke --only nm_mask \
        --out "$OUT/ops.json"
}

build() {
    step device 10 nvidia-smi
    "$python" -c "from pyprune import _C; import pyprune.triton_kernels; assert _C.with_cuda" 2>/dev/null && return
    # without a compiler, or if the build fails, the Triton half still runs on the sources as they lie
    if ! PYPRUNE_CUDA_ARCHS="${PYPRUNE_CUDA_ARCHS:-native}" step build 90 "$python" -m pip install -q --no-deps \
            --no-index --no-build-isolation -e .; then
        [ -e pyprune/triton_kernels ] || { ln -s ../triton_kernels pyprune/triton_kernels &&
            trap 'rm -f pyprune/triton_kernels' EXIT; }
        export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    fi
}

part_one() {
    step ceilings 40 "$python" -m benchmarks study first_contact ceilings
    step smoke 150 "$python" -m benchmarks study first_contact smoke
    step block 150 "$python" -m benchmarks study first_contact block --backends auto,triton,reference
    step ops 140 "$python" -m benchmarks run ops --seconds 1 --out "$OUT/ops.json"
}

part_two() {
    step cuda_tests 110 "$python" -m pytest -q --junitxml="$OUT/cuda_tests.xml" tests/ops/test_cuda_gpu.py
    step triton_tests 150 "$python" -m benchmarks study first_contact tests
    if command -v compute-sanitizer > /dev/null; then
        step memcheck 70 compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -m pytest -q \
            tests/ops/test_cuda_gpu.py -k "sweep and 63 or nm_mask and 4-8 or cholesky and 129"
        step racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 1 "$python" -m pytest -q \
            tests/ops/test_cuda_gpu.py -k "sweep and 63 or select and 1000 and 0.5"
    fi
    step whole_runs 80 "$python" -m pytest -q --junitxml="$OUT/run_tests.xml" tests/pipeline/test_gpu_end_to_end.py
}

case "$what" in
    --rehearse) rehearse ;;
    1) build; part_one ;;
    2) build; part_two ;;
    all) build; part_one; part_two ;;
    *) echo "gpu_run.sh takes 1, 2, --rehearse or nothing, got $what" >&2; exit 2 ;;
esac
printf "%s" "$summary" | tee -a "$log"
exit $failed
