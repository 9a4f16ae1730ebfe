#!/usr/bin/env bash
# Interpreter tests and the full cross product of ahead-of-time compilation (kernel × configuration × architecture) on
# the oldest and the newest supported Triton, each in an environment of its own. Takes some minutes.
#   tests/triton_versions.sh [FOLDER]     keeps the environments in FOLDER (default: a temporary one)
set -eu
cd "$(dirname "$0")/.."
root=$PWD
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
for version in 3.6.0 3.9.0; do
    venv=$folder/triton-$version
    if [ ! -x "$venv/bin/python" ]; then
        python3 -m venv "$venv"
        # the interpreter of Triton 3.6 needs numpy < 2.4; torch's CPU wheel does not ask for a Triton of its own
        numpy=numpy; [ "$version" = 3.6.0 ] && numpy="numpy<2.4"
        "$venv/bin/pip" install -q "${TORCH:-torch==2.13.0+cpu}" "$numpy" "transformers>=5.17" "datasets>=3" safetensors \
            pyyaml jinja2 rich typer pytest hypothesis
        "$venv/bin/pip" install -q --no-deps "triton==$version"
    fi
    # the package as an import sees it, without a build
    sources=$folder/sources-$version
    rm -rf "$sources"
    mkdir -p "$sources"
    cp -r pyprune "$sources/pyprune"
    cp -r triton_kernels "$sources/pyprune/triton_kernels"
    export PYTHONPATH=$sources
    echo "== Triton $version: interpreter"
    tests=$(ls "$root"/tests/ops/test_triton_*.py | grep -v -e _aot -e _gpu)
    # from elsewhere: -m puts the working folder first on the path, and the sources there have no triton_kernels inside
    (cd "$folder" && "$venv/bin/python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" $tests)
    echo "== Triton $version: every kernel, configuration and architecture"
    export TRITON_CACHE_DIR=$folder/cache-$version
    for shard in 0 1; do
        "$venv/bin/python" "$root/tests/aot.py" --shard $shard/2 > "$folder/aot-$version-$shard.jsonl" &
        eval "job$shard=\$!"
    done
    wait "$job0"
    wait "$job1"
    "$venv/bin/python" - "$folder/aot-$version-0.jsonl" "$folder/aot-$version-1.jsonl" <<'PYTHON'
import json
import sys

rows = [json.loads(line) for path in sys.argv[1:] for line in open(path)]
bad = [r for r in rows if r["stack"] or r["shared"] > r["limit"] or r.get("matrix") is False]
print(f"{len(rows)} compiled, {len(bad)} with spills, too much shared memory or no tensor core product")
for row in bad:
    print(row)
sys.exit(bool(bad))
PYTHON
done
