# `make demo` and `make test` are all that a newcomer needs: they set themselves up in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := edge,edge-tflite,dicom,camera,cloud,train,broker,dev
SOURCES := splitward edge cloud export firmware_sim tests benchmarks

.PHONY: help setup demo test test-arm64 check format bench constraints mosquitto postgresql emulators image-container bench-arm64 clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.installed ## virtual environment with the tested versions

# torch first and alone: asked for by another package, it could come as a CUDA build of several gigabytes.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

demo: setup ## the whole product, small, on real images; results in demo/
	$(BIN)/splitward demo $(DEMO)

test: setup mosquitto postgresql check ## everything but the emulated board; a skip says what is missing
	$(BIN)/python -m pytest --ignore=tests/arm64 $(PYTEST)

test-arm64: setup mosquitto emulators ## the device under emulation: programs, container, whole machines; as root
	$(BIN)/python -m pytest tests/arm64 $(PYTEST)

check: setup ## style, types, and who may import whom
	$(BIN)/ruff format --check --quiet $(SOURCES)
	$(BIN)/ruff check --quiet $(SOURCES)
	$(BIN)/mypy --no-error-summary
	$(BIN)/lint-imports --no-cache > $(VENV)/imports.log || { cat $(VENV)/imports.log; exit 1; }

format: setup ## format the sources
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: setup ## speed and memory, to docs/results/bench.json
	$(BIN)/python -m benchmarks.bench

# The tests' real broker, and the library that gives a process a clock of its own. Only root can install them;
# without them those tests skip.
mosquitto:
	@PATH="$$PATH:/usr/sbin"; command -v mosquitto > /dev/null && command -v faketime > /dev/null && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mosquitto faketime > /dev/null; \
	else echo "mosquitto or faketime is not installed: their tests will be skipped (apt install mosquitto faketime)"; fi

# What tests/arm64 builds and starts images with. Only root can install it; without it those tests skip.
EMULATORS := qemu-user-static binfmt-support qemu-system-arm qemu-efi-aarch64 qemu-utils mtools dosfstools e2fsprogs \
	squashfs-tools zstd kmod cpio rauc buildah passwd
emulators:
	@if [ "$$(id -u)" = 0 ] && command -v dpkg-query > /dev/null; then \
		missing=$$(for one in $(EMULATORS); do dpkg-query -W -f '$${Status}' $$one 2> /dev/null | grep -q 'ok installed' || echo $$one; done); \
		[ -z "$$missing" ] || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing > /dev/null; }; \
	else echo "tests/arm64 needs root and, installed: $(EMULATORS)"; fi

image-container: ## the device's container for arm64, with buildah; OUT=FILE BASE=FOLDER
	$(BIN)/hadolint Dockerfile.arm64
	.ci/container $(or $(OUT),build/splitward-edge.oci.tar) $(BASE)

bench-arm64: setup emulators ## image, container and machines under emulation, to docs/results/arm64.json; as root
	$(BIN)/python -m benchmarks.arm64

# Likewise the tests' real PostgreSQL.
postgresql:
	@ls /usr/lib/postgresql/*/bin/initdb > /dev/null 2>&1 && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql > /dev/null; \
	else echo "postgresql is not installed: its tests will be skipped (apt install postgresql)"; fi

constraints: setup ## pin what is installed now
	@{ sed -n '1,2p' constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/+cpu//'; } > constraints.new
	@mv constraints.new constraints.txt

clean: ## remove what was made
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
