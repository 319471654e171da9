# Everything runs in a private .venv, made on first use from the Python found here. Only Python >= 3.11 and make are needed.
#
#   make demo     train a small vision-language model on real images (a few minutes, 2 CPU cores are enough)
#   make demo-video  train one on videos of moving digits; make demo-text  on records as text (minutes)
#   make demo-lora  teach the demo's model another question by LoRA, after `make demo` (a minute)
#   make demo-audio  train a small model that hears on synthetic telephone tones (a minute)
#   make test     the fast test suite          make test-full   with the slow tests
#   make check    format, lint, types, tests, test-npu   make check-full   the same with the slow tests
#   make test-npu  checks every call of ops.table("npu") against torch_npu itself, which is installed beside (no NPU is needed)
#   make format   rewrite files in the project's format
#   make house    draw which package imports which into docs/architecture.md
#   make schema   write the JSON schema of the settings, for editors, to configs/schema.json
#   make configs  plan the ready configs again and write what is expected of them
#   make migrating  draw what becomes of another system's settings into docs/migrating.md
#   make support  draw which mechanism works for which family into docs/support.md
#   make npu      draw which operators of torch_npu are called, and what is proved of them, into docs/npu.md
#   make evidence  measure what the cards of docs/evidence state, and draw their index (minutes each)
#
# A machine with an accelerator: give its torch, for instance  make demo TORCH="torch==2.13.0 --index-url URL".

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
TORCH_NPU ?= torch_npu==2.13.0
JOBS ?= 2
DEMO := build/demo

BIN := .venv/bin
STAMP := .venv/installed
NPU_STAMP := .venv-npu/installed

# Test processes share the cores: one thread each is faster than several that compete. A test that hangs ends the suite.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --max-worker-restart 0

.PHONY: demo demo-video demo-text demo-audio demo-lora test test-full test-npu lint check check-full format house support npu schema configs migrating evidence clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3 found; give one: make PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; give a newer one: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev,demo]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/digits.py $(DEMO)
	$(BIN)/mmfn train configs/demo.yaml
	$(BIN)/python examples/verify_export.py $(DEMO)

demo-video: $(STAMP)
	$(BIN)/python examples/moving_digits.py build/demo-video
	$(BIN)/mmfn train configs/demo-video.yaml
	$(BIN)/mmfn eval configs/demo-video.yaml model.init=load model.path=build/demo-video/run/checkpoint

demo-text: $(STAMP)
	$(BIN)/python examples/cells.py build/demo-text
	$(BIN)/mmfn train configs/demo-text.yaml
	$(BIN)/mmfn eval configs/demo-text.yaml model.init=load model.path=build/demo-text/run/checkpoint

demo-lora: $(STAMP)
	@test -f $(DEMO)/run/checkpoint/config.json || { echo "there is no trained demo yet; run make demo first"; exit 1; }
	$(BIN)/mmfn train configs/lora.yaml
	$(BIN)/python examples/verify_adapter.py $(DEMO)

demo-audio: $(STAMP)
	$(BIN)/python examples/dtmf.py $(DEMO)-audio
	$(BIN)/mmfn train configs/demo-audio.yaml
	$(BIN)/python examples/verify_sound.py $(DEMO)-audio

test: $(STAMP)
	$(PYTEST) -m "not slow" --timeout 900

test-full: $(STAMP)
	$(PYTEST) --timeout 7200

# An environment of its own: where torch_npu is installed without CANN, torch cannot be imported as usual.
$(NPU_STAMP): pyproject.toml
	test -x .venv-npu/bin/python || "$(PYTHON)" -m venv .venv-npu
	.venv-npu/bin/python -m pip install --quiet $(TORCH) $(TORCH_NPU)
	.venv-npu/bin/python -m pip install --quiet -e . 'pytest>=8.0' 'pytest-timeout>=2.3'
	touch $@

test-npu: $(NPU_STAMP)
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 OMP_NUM_THREADS=1 .venv-npu/bin/python -m pytest -m npu tests/npu

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test test-npu

check-full: lint test-full test-npu

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

house: $(STAMP)
	$(BIN)/python docs/house.py

support: $(STAMP)
	$(BIN)/python -m docs.support

npu: $(STAMP)
	$(BIN)/python -m docs.npu

configs: $(STAMP)
	$(BIN)/python configs/generate.py --refresh

migrating: $(STAMP)
	$(BIN)/python docs/migrating.py

schema: $(STAMP)
	$(BIN)/mmfn config schema --out configs/schema.json

evidence: $(STAMP)
	for card in docs/evidence/cards/*.yaml; do \
		$(BIN)/mmfn verify $$card --out docs/evidence/$$(basename $$card .yaml).md || exit 1; \
	done
	$(BIN)/python -m docs.cards

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
