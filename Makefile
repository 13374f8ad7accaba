# make quickstart   install, then watch a model learn Chinese instructions (offline, CPU, two minutes)
# make test         install, then run the tests
# make test-long    the exhaustive ones: every engine, every width, every kill
# make check        format, lint, types, floors and the fast tests
# make docs         write again what is generated: docs/cli.md, docs/config.md, docs/families.md

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
QUICKSTART ?= quickstart
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock

.PHONY: quickstart test test-long check format docs clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml requirements.lock | $(BIN)/python
	$(PIP_INSTALL) -e .
	touch $@

# llama.cpp has no wheel for Linux and is compiled, three to four minutes on two cores, once: pip keeps the wheel in its
# cache. Without a C++ compiler the tests that need it are skipped.
LLAMA_CPP_FLAGS := -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF \
	-DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF

$(VENV)/.installed-dev: pyproject.toml requirements.lock | $(BIN)/python
	$(PIP_INSTALL) -e ".[hub,quant,dist,serve,eval,lm-eval,dev]" gguf
	CMAKE_ARGS="$(LLAMA_CPP_FLAGS)" CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc 2>/dev/null || echo 2) \
		$(PIP_INSTALL) llama-cpp-python || \
		echo "llama-cpp-python could not be built (a C++ compiler is needed): tests that need it are skipped"
	touch $@ $(VENV)/.installed

# gptqmodel looks for torch while it is built, so it is installed after it and without isolation (a C++ compiler is
# needed; pip keeps the wheel in its cache). Where it does not build, the tests that need it are skipped.
$(VENV)/.installed-gptq: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock setuptools wheel ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock --no-build-isolation \
		gptqmodel optimum || echo "gptqmodel could not be built: tests that need it are skipped"
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/tuoling quickstart --out $(QUICKSTART)

test: $(VENV)/.installed-gptq
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-long: $(VENV)/.installed-gptq
	$(BIN)/python -m pytest -n 2 --dist loadfile -m long

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy & types=$$!; \
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not long"; tests=$$?; \
	wait $$types && exit $$tests

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/make_help.py
	$(BIN)/python docs/make_config.py
	$(BIN)/python benchmarks/families.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info
