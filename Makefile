# `make` lists the commands. Everything is installed into $(VENV); stamp files there make a second run immediate.

PYTHON ?= python3
VENV   ?= .venv
# The PyTorch to check against. It is installed first and on its own, so that a CPU-only build that is
# chosen here (a requirement or a wheel file) is kept: a range would take the newest build with its gigabytes of CUDA.
TORCH  ?= torch==2.13.0
# Number of test processes, each with up to 2 GB of memory.
JOBS   ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := $(shell find tvm_attn targets schedules models/demo -type f -not -name '*.pyc' -not -name '*.so*')
VULKAN_TESTS := tests/vulkan tests/kernels/test_cases.py tests/kernels/gpu tests/compiler/test_vulkan.py -k 'not test_cases or vulkan'
SWIFTSHADER := $(abspath $(VENV))/swiftshader/icd.json
VULKAN_SOURCES := CMakeLists.txt hatch_build.py $(wildcard tvm_attn/vulkan/src/*)

.DELETE_ON_ERROR:
.PHONY: help demo test test-slow lint bench clean llama-server swiftshader system system-aarch64 system-chromium system-vulkan

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: dist/demo/manifest.json ## build the bundled demo model for this CPU, check it, generate text
	$(BIN)/tvm-attn generate dist/demo --prompt "Return the" --max-new-tokens 60 --temperature 0.8 --top-k 40 --seed 0

PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

test: $(VENV)/.installed-test ## run all tests except the long ones
	$(PYTEST) -m 'not slow'

test-slow: $(VENV)/.installed-test llama-server swiftshader ## run the long tests, and the Vulkan tests on a second driver
	$(PYTEST) -m slow
	if [ -e $(SWIFTSHADER) ]; then VK_DRIVER_FILES=$(SWIFTSHADER) $(PYTEST) -m 'not slow' $(VULKAN_TESTS); fi

lint: $(VENV)/.installed-dev ## check style, format and types; print the lines of the package by folder
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	@find tvm_attn -name '*.py' -o -name '*.cc' -o -name '*.h' | xargs wc -l | awk '$$2 != "total" { \
		depth = split($$2, part, "/"); lines[depth > 2 ? part[1] "/" part[2] "/" : part[1] "/*.py"] += $$1; all += $$1 \
	} END { for (name in lines) printf "%7d  %s\n", lines[name], name; printf "%7d  all\n", all }' | sort -n

bench: dist/gpt2-random/manifest.json ## measure GPT-2 124M with random weights on this CPU
	$(BIN)/tvm-attn bench dist/gpt2-random

clean: ## remove what was built and every cache, but not $(VENV)
	rm -rf dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis tvm_attn/vulkan/*.so*
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

dist/demo/manifest.json: $(VENV)/.installed-verify $(SOURCES)
	$(BIN)/tvm-attn build --model models/demo --target cpu --out dist/demo

dist/gpt2-random/manifest.json: $(VENV)/.installed-verify $(SOURCES)
	$(BIN)/tvm-attn build --model gpt2 --random-weights --target cpu

# $(VENV)/.installed-EXTRA: this checkout, editable, with one extra of pyproject.toml. Compiles the Vulkan runtime if
# the machine has the tools.
$(VENV)/.installed-%: pyproject.toml $(VULKAN_SOURCES) $(VENV)/.installed-torch
	$(PIP) --editable '.[$*]'
	@touch $@

$(VENV)/.installed-test: | system-vulkan system-chromium system-aarch64

$(VENV)/.installed-torch: | $(BIN)/pip
	$(PIP) $(TORCH)
	@touch $@

$(BIN)/pip: | system
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than Python 3.10: name a newer one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Debian packages: each line adds a package if what it provides is missing. Root installs them, other users are told how.
system:
	@missing=; \
	for cxx in "$$CXX" g++ clang++; do command -v "$$cxx" && break; done >/dev/null || missing="$$missing g++"; \
	[ -x $(BIN)/pip ] || $(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" -ne 0 ]; then echo "missing:$$missing; install with: apt-get install$$missing" >&2; exit 1; fi; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing

# Packages for compiling and testing the Vulkan runtime, with a driver only if there is none. Nothing else needs them: if
# they cannot be installed, the tests run without them.
system-vulkan: | system
	@missing=; \
	command -v cmake >/dev/null || missing="$$missing cmake"; \
	command -v spirv-val >/dev/null || missing="$$missing spirv-tools"; \
	[ -e /usr/include/vulkan/vulkan_core.h ] || missing="$$missing libvulkan-dev"; \
	ls /usr/share/vulkan/icd.d/*.json /etc/vulkan/icd.d/*.json >/dev/null 2>&1 || missing="$$missing mesa-vulkan-drivers"; \
	ls /usr/share/vulkan/explicit_layer.d/*khronos_validation*.json >/dev/null 2>&1 || missing="$$missing vulkan-validationlayers"; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" -eq 0 ] && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing; then exit 0; fi; \
	echo "missing for Vulkan:$$missing; tests are skipped until: apt-get install$$missing" >&2

# A browser for tests/serving/test_page.py, which is skipped without it.
system-chromium: | system-vulkan
	@[ ! -e /usr/bin/chromium ] || exit 0; \
	if [ "$$(id -u)" -eq 0 ] && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core; then exit 0; fi; \
	echo "missing for the page of the server: chromium; its tests are skipped until: apt-get install chromium" >&2

# The cross compiler for Arm, which a slow test links with.
system-aarch64: | system-chromium
	@! command -v aarch64-linux-gnu-g++ >/dev/null && [ "$$(uname -m)" != aarch64 ] || exit 0; \
	if [ "$$(id -u)" -eq 0 ] && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends g++-aarch64-linux-gnu; then exit 0; fi; \
	echo "missing for Arm: g++-aarch64-linux-gnu; a test is skipped until: apt-get install g++-aarch64-linux-gnu" >&2

# llama.cpp's server, which the load test is compared with. It is compiled; if that fails, its tests are skipped.
llama-server: $(VENV)/.installed-test
	@$(MAKE) --no-print-directory $(VENV)/.installed-llama || \
		echo "llama-cpp-python could not be installed; its tests are skipped" >&2

# The second Vulkan driver is extracted from Debian's Chromium package (30 MB); nothing is installed. If the package is not
# available, the tests run without it.
swiftshader: ## fetch the second Vulkan driver that test-slow runs on
	@[ ! -e $(SWIFTSHADER) ] || exit 0; \
	scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && mkdir -p $(dir $(SWIFTSHADER)) && cd "$$scratch" || exit 0; \
	[ "$$(id -u)" -ne 0 ] || apt-get update -qq; \
	for package in chromium-common chromium; do \
		apt-get download -qq -o APT::Sandbox::User=root $$package 2>/dev/null && \
			dpkg-deb --fsys-tarfile $${package}_*.deb | tar -x ./usr/lib/chromium/libvk_swiftshader.so 2>/dev/null && break; \
	done; \
	if [ -s usr/lib/chromium/libvk_swiftshader.so ]; then \
		mv usr/lib/chromium/libvk_swiftshader.so $(dir $(SWIFTSHADER)) && \
		echo '{"file_format_version": "1.0.0", "ICD": {"library_path": "./libvk_swiftshader.so", "api_version": "1.3.0"}}' \
			> icd.json && mv icd.json $(SWIFTSHADER); \
	else \
		echo "no SwiftShader: Debian's package chromium-common is not available; its tests are left out" >&2; \
	fi
