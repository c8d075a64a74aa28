# From a bare clone: make demo, make test. Needs make and Python 3.10 or newer with venv, nothing else.

PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= runs/quickstart
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo install browser lint test test-slow clean

demo: $(INSTALLED)
	$(BIN)/python training/quickstart.py --output_dir $(OUTPUT)

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# For the tests of the Space. Where none can be had, they say so and are skipped.
browser:
	@{ command -v chromium || command -v google-chrome || command -v chromium-browser; } >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } \
	|| echo "No Chromium here, and it cannot be installed: browser tests will be skipped."

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Two workers of one thread each: the models of the tests are too small for more threads to help.
test: lint browser
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations 10

test-slow: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) build *.egg-info
