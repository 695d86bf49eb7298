# Each target works alone on a fresh machine: it makes .venv, installs torch and the tools, builds, then does its work.
# Stamps inside .venv make a second call start at once.
#
#   make build      the package and its native library, into .venv
#   make demo       ResNeXt-50 on a photograph
#   make test       the tests, with torchvision and timm as witnesses and Ray, without the slow ones
#   make test-all   all of them, with ONNX Runtime, OpenVINO, ncnn and MNN too
#   make bench      microbenchmarks of each kernel; `make bench-models` compares whole models with other stacks,
#                   `make bench-all` one member of every family (hours; `python -m bench.models --resume FILE` goes on)
#   make lint       look; `make format` changes
#   make clean      no build products; the environment stays (`rm -r .venv` for that)
#
# PYTHON  interpreter for .venv             make test PYTHON=python3.12
# VENV    where the environment lives       make test VENV=/some/dir
# TORCH   what pip is given for torch       make build TORCH="torch==2.11.0"
# WORKERS processes that share the tests    make test WORKERS=8
# ARGS    passed on to pytest or the CLI    make test ARGS="-k resnet -x"

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
WORKERS ?= 2
ARGS   ?=

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh' -o -type d)

.PHONY: build demo test test-all bench bench-models bench-all lint format clean
.DELETE_ON_ERROR:
.DEFAULT_GOAL := build

$(STAMPS)/venv:
	$(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing: on Debian, apt install python3-venv"; exit 1; }
	mkdir -p $(STAMPS) && touch $@

# torch comes first and is pinned; nothing after it may pull in another one.
$(STAMPS)/torch: $(STAMPS)/venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install $(TORCH)
	touch $@

$(STAMPS)/tools: $(STAMPS)/torch
	$(PIP) install 'setuptools>=77' wheel cmake ninja 'pybind11>=3' numpy
	touch $@

# The editable install also builds; later changes of the C++ sources only need the build step below it.
$(STAMPS)/install: $(STAMPS)/tools pyproject.toml setup.py
	$(PIP) install --no-build-isolation --editable '.[demo,test]'
	touch $@

$(STAMPS)/build: $(STAMPS)/install CMakeLists.txt $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@$(BIN)/python -c 'import json, fast_backbones as fb; print(json.dumps(fb.build_info(), indent=1))'
	touch $@

# The public implementations that tests compare with. They depend on torch, so they come without dependencies.
# Ray is what examples/ray_features.py runs on.
$(STAMPS)/models: $(STAMPS)/install
	$(PIP) install --no-deps torchvision timm
	$(PIP) install huggingface_hub pyyaml 'ray[data]'
	touch $@

$(STAMPS)/peers: $(STAMPS)/models
	$(PIP) install --no-build-isolation --editable '.[peers]'
	touch $@

$(STAMPS)/lint: $(STAMPS)/venv
	$(PIP) install ruff 'clang-format==19.*'
	touch $@

build: $(STAMPS)/build

demo: build
	$(BIN)/fast-backbones run sample:china --model resnext50_32x4d $(ARGS)

test: build $(STAMPS)/models
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m 'not slow' --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=20 $(ARGS)

test-all: build $(STAMPS)/peers
	$(BIN)/python -m pytest $(ARGS)

bench: build
	mkdir -p build/bench
	$(BIN)/python -m pytest bench --ignore bench/gpu --benchmark-only --benchmark-columns=median,iqr,rounds \
		--benchmark-json=build/bench/kernels.json $(ARGS)

bench-models: build $(STAMPS)/peers
	$(BIN)/python -m bench.models resnet50 resnext50_32x4d --batch 1 16 $(ARGS)

bench-all: build $(STAMPS)/peers
	$(BIN)/python -m bench.models --all $(ARGS)

lint: $(STAMPS)/lint
	$(BIN)/ruff check .

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build dist *.egg-info kernels/_C*.so kernels/_build.json $(STAMPS)/install $(STAMPS)/build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
