# make demo | test | test-slow | sanitize | mutants | bench | lint | format | audit | env
# Each sets up .venv first (once). DETECTRON2=<wheel, folder or URL> adds Detectron2 to it.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PROJECT := projects/GroupSampling
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
# A process for each core, with one thread each; tests of threads set their number themselves.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal
PYTEST_ARGS ?=
CXX_FILES = $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.h' 'tests/*.cpp')

.PHONY: env demo test test-slow sanitize mutants bench lint format audit clean

$(VENV)/.dependencies: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -r requirements.lock
	@touch $@

$(VENV)/.extension: $(VENV)/.dependencies $(SOURCES)
	@echo "Building the extension (minutes where a GPU and a CUDA toolkit are found)"
	$(PY) -m pip install --no-build-isolation --no-deps --verbose --editable . > $(VENV)/build.log 2>&1 \
		|| { tail -n 40 $(VENV)/build.log; exit 1; }
	@grep -hE "^ *group-sampling: (building|installing)" $(VENV)/build.log | sort -u
	@touch $@

# Detectron2 is not on PyPI, where nobody owns its name: pip looks for it without an index, or takes what was named.
env: $(VENV)/.extension
	@if $(PY) -c 'import detectron2' 2> /dev/null && [ -z "$(DETECTRON2)" ]; then \
		echo "Detectron2: found in $(VENV)"; \
	elif [ -n "$(DETECTRON2)" ]; then \
		$(PY) -m pip install --no-build-isolation --no-deps "$(DETECTRON2)" && \
		$(PY) -m pip install -r requirements-detectron2.lock && \
		$(PY) -c 'import detectron2'; \
	elif $(PY) -m pip install --no-index --no-deps --only-binary :all: detectron2 > /dev/null 2>&1; then \
		$(PY) -m pip install -r requirements-detectron2.lock && echo "Detectron2: installed from the configured find-links"; \
	else \
		echo "Detectron2: not found; continuing with the torchvision engine (to add it, see Install in README.md)"; \
	fi

demo: env
	$(PY) $(PROJECT)/tools/demo.py

test: env
	$(PYTEST) $(PYTEST_ARGS)

test-slow: env
	$(PYTEST) -m slow $(PYTEST_ARGS)

sanitize: env  # the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	$(PY) -m pytest -m slow tests/ops/test_op_builds.py -k sanitizers

mutants: env  # changes the core's code, one small change at a time: do its tests notice? MODULES="boxes losses" for a part
	$(PY) tests/mutation/run.py $(if $(MODULES),--modules $(MODULES))

bench: env
	$(PY) $(PROJECT)/benchmarks/bench_matcher.py
	$(PY) $(PROJECT)/benchmarks/bench_training.py

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

format: env
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

audit:  # known vulnerabilities of the locked versions; asks PyPI, so CI does not run it
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet pip-audit
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip -r requirements.lock -r requirements-detectron2.lock

clean:
	rm -rf $(VENV) build output
