# Everything comes from here: `make demo` and `make test` set up .venv by themselves.
PYTHON ?= python3
BUDGET ?= full
VENV := .venv
BIN := $(VENV)/bin
# pip's own output only matters when it fails
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test launches faults clean

demo: $(VENV)/.installed
	@$(BIN)/python -m mimetic.cli demo --out runs/demo --budget $(BUDGET)

test: $(VENV)/.tested
	$(BIN)/ruff check .
	@rm -rf build && $(PIP) --no-deps --target build/typed . && rm -rf build/lib build/bdist*
	MYPYPATH=build/typed $(BIN)/mypy -p mimetic
	$(BIN)/python -m pytest -n 2

launches: $(VENV)/.tested
	$(BIN)/python -m pytest tests/launches

faults: $(VENV)/.tested
	$(BIN)/python -m pytest -n 2 tests/faults

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@echo "setting up $(VENV): torch and the rest, about 5.6 GB, 3 to 5 minutes the first time"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) torch torchvision
	@$(PIP) --editable .
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	@echo "adding what tests need: other people's models to hold ours against"
	@$(PIP) --editable '.[test]'
	@$(PIP) --no-deps dall-e  # it asks for mypy, pytest, blobfile and more, and uses attrs, numpy, torch and requests
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
