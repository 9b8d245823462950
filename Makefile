# Two commands on a fresh machine, each doing all of its own set-up: make demo, make test.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# The same build everywhere, so that results can be compared; users get the range of pyproject.toml.
TORCH ?= torch==2.13.0

.PHONY: demo test lint screenshots clean

demo: $(VENV)/.demo
	$(BIN)/clinicalfmamba demo -o demo-output
	@echo "Open demo-output/*.png"

test: $(VENV)/.test lint
	$(BIN)/python -m pytest

# Pictures of the panel, for the README and the extension's page; look at them.
screenshots: $(VENV)/.test
	$(BIN)/python Testing/host --testing --additional-module-paths ClinicalFMamba --python-script Testing/Python/screenshots.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[train,fast]" "$(TORCH)"
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[test]" "$(TORCH)"
	$(BIN)/python Testing/host/libraries.py
	touch $@

clean:
	rm -rf $(VENV) demo-output build *.egg-info
