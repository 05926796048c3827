# `make demo` and `make test` are all that a newcomer needs: they set themselves up in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := edge,edge-tflite,dicom,camera,cloud,train,broker,dev
SOURCES := splitward edge cloud export firmware_sim tests benchmarks

.PHONY: help setup demo test test-arm64 check format bench constraints tools emulators image-container bench-arm64 clean

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

test: setup tools emulators check ## everything, the emulated device first; a skip says what is missing
	$(BIN)/python -m pytest --numprocesses 2 --no-loadscope-reorder $(PYTEST)

test-arm64: setup tools emulators ## the device under emulation alone: programs, container, whole machines
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

# Debian packages that tests need, and what it means that they are missing. Only root can install them.
define apt
	@if [ "$$(id -u)" = 0 ] && command -v dpkg-query > /dev/null; then \
		missing=$$(for one in $(1); do dpkg-query -W -f '$${Status}' $$one 2> /dev/null | grep -q 'ok installed' || echo $$one; done); \
		[ -z "$$missing" ] || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing > /dev/null; }; \
	else echo "$(2): apt install $(1)"; fi
endef

# A real broker, a real database, a real browser, clocks that jump, disks that stall, and what reads the files of deploy/.
TOOLS := mosquitto faketime strace postgresql chromium docker-compose prometheus
tools:
	$(call apt,$(TOOLS),tests that lack one of these are skipped)

# What tests/arm64 builds and starts images with.
EMULATORS := qemu-user-static binfmt-support qemu-system-arm qemu-efi-aarch64 qemu-utils mtools dosfstools e2fsprogs \
	squashfs-tools zstd kmod cpio rauc buildah passwd
emulators:
	$(call apt,$(EMULATORS),tests of the emulated device need root and are skipped without)

image-container: ## the device's container for arm64, with buildah; OUT=FILE BASE=FOLDER
	$(BIN)/hadolint Dockerfile.arm64
	.ci/container $(or $(OUT),build/splitward-edge.oci.tar) $(BASE)

bench-arm64: setup emulators ## image, container and machines under emulation, to docs/results/arm64.json; as root
	$(BIN)/python -m benchmarks.arm64


constraints: setup ## pin what is installed now
	@{ sed -n '1,2p' constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/+cpu//'; } > constraints.new
	@mv constraints.new constraints.txt

clean: ## remove what was made
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
