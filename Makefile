# From a bare clone: make demo, make photos DATASET=DIR, make test, make test-latest. Needs make and Python 3.10 or newer with venv, nothing else.

PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= runs/quickstart
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo photos install browser lint docs test test-slow test-latest test-oldest clean

demo: $(INSTALLED)
	$(BIN)/python training/quickstart.py --output_dir $(OUTPUT)

# Both stages on your photos: make photos DATASET=DIR. What a folder needs: docs/data.md; what to expect: docs/photos.md.
VISION_MODEL ?= google/mobilenet_v2_1.0_224
LANGUAGE_MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
photos: OUTPUT := $(if $(filter command line environment,$(origin OUTPUT)),$(OUTPUT),runs/photos)
photos: $(INSTALLED)
	@test -n '$(DATASET)' || { echo 'error: no photos. Pass their folder: make photos DATASET=DIR'; exit 2; }
	$(BIN)/python training/photos.py --dataset '$(DATASET)' --vision_model '$(VISION_MODEL)' \
	--language_model '$(LANGUAGE_MODEL)' --output_dir '$(OUTPUT)'

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

# build/site: the pages of docs/, without a warning.
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict --quiet

# Two workers of one thread each: the models of the tests are too small for more threads to help.
test: lint browser
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations 10

test-slow: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# The newest releases that setup.py allows (constraints-latest.txt pins torch alone) and the oldest, each in an environment
# made anew, since releases move: the library's tests, then every training script, an evaluation, and the Space in an
# environment of its own, which answers one request. The other tests, most of the time of `make test`, run there only, and
# gradio is not in these environments: it would hold Pillow back.
# TRY installs what setup.py does not allow yet: make test-latest TRY=transformers==5.25.0
test-latest test-oldest: export PIP_CONSTRAINT = $(CURDIR)/constraints-$*.txt
test-latest test-oldest: test-%:
	rm -rf .venv-$*
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install -qq --editable '.[test-library]'
	$(if $(TRY),.venv-$*/bin/pip install -qq $(TRY))
	@.venv-$*/bin/pip freeze --exclude-editable | grep -iE '^(torch|transformers|accelerate|datasets|peft|huggingface.hub|pillow)='
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRY='$(TRY)' .venv-$*/bin/python -m pytest -n 2 --dist loadfile --durations 10 \
	-m 'not slow' tests/library tests/releases

clean:
	rm -rf $(VENV) .venv-latest .venv-oldest build *.egg-info
