# `make demo` and `make test` need Python 3.11+ and a package index, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Everything this project makes outside its sources.
BUILD := build

.PHONY: demo demo-github test test-all lint format docs bench-preview bench-merge bench-gates bench-gguf bench-publish image-check clean help

help:
	@echo "make demo         one recipe from preview to a published model, on real input, without an account"
	@echo "make demo-github  a recipe repository's day on a GitHub of this machine; REQUESTS=1 prints every request"
	@echo "make test         the tests (minutes)"
	@echo "make test-all     the slow end-to-end tests too"
	@echo "make lint         ruff, mypy, and the linters of workflows and Dockerfile"
	@echo "make bench-preview  the six community recipes in one command"
	@echo "make bench-merge  the merge beside mergekit-moe and cp"
	@echo "make bench-gates  the gates beside mergekit's"
	@echo "make bench-gguf   GGUF files beside llama.cpp's converter and quantiser"
	@echo "make bench-publish  publishing beside upload_folder, downloads and disk beside the promise, and under faults"
	@echo "make image-check  build the preview image and run it"
	@echo "make docs         write the generated pages again"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moerge needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[build,hub,demo,dev]'
	@touch $@

# lm-eval, with some 600 MB of what it needs: for the tests, not for the demo.
$(VENV)/.evaluates: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[eval]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m demo

demo-github: $(VENV)/.installed
	$(BIN)/python -m demo.story $(if $(REQUESTS),--requests)

test: $(VENV)/.evaluates
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

test-all: $(VENV)/.evaluates
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/zizmor --offline --quiet --pedantic .github/workflows action.yml
	$(BIN)/actionlint
	$(BIN)/check-jsonschema --builtin-schema vendor.github-actions action.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/hadolint Dockerfile
	$(BIN)/python -m pytest --quiet tests/bot/test_init.py -k linters

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(BIN)/python -m merge.findings > docs/findings.md

bench-gates: $(VENV)/.installed
	$(BIN)/python benchmarks/gates_vs_mergekit.py
	$(BIN)/python benchmarks/routing.py

bench-merge: $(VENV)/.installed
	$(BIN)/python -m benchmarks.merge_speed

bench-preview: $(VENV)/.installed
	$(BIN)/python -m benchmarks.preview_speed

bench-gguf: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gguf_speed

bench-publish: $(VENV)/.installed
	$(BIN)/python -m benchmarks.publish_speed
	$(BIN)/python -m benchmarks.publish_faults

# Takes docker, podman or buildah, whichever works; without a registry the base image is made with debootstrap.
image-check: $(VENV)/.installed
	$(BIN)/python -m scripts.image_check

clean:
	rm -rf $(BUILD) $(VENV)
