# Two commands for newcomers: `make serve` and `make test`. The rest is for developers: `make check`, `protos`, `bench`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch's newest wheel brings gigabytes of CUDA libraries; the constraints name a set that is known to work together.
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: serve test soak check format protos bench clean

serve: $(VENV)/installed
	@$(BIN)/quire serve $(ARGS)

test: $(VENV)/installed-test build/path/quire
	$(BIN)/python -m pytest $(ARGS)

# A million random operations on the scheduler, from a seed that is drawn and printed; about ten minutes.
soak: $(VENV)/installed-test
	cd tests && ../$(BIN)/python -W error sharing_walk.py 1000000 $(SEED)

check: $(VENV)/installed-test build/path/quire
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p quire.scheduler -p quire.cluster -p quire.worker -p quire.kernels

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/installed-test build/path/quire
	cd build/path && ../../$(BIN)/python -m grpc_tools.protoc -Iquire/protos=quire/protos \
		--python_out=. --pyi_out=. --grpc_python_out=. quire/protos/generation.proto \
		quire/protos/relay.proto quire/protos/worker.proto

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.scheduler
	$(BIN)/python -m benchmarks.host_cost
	$(BIN)/python -m benchmarks.startup --repeat 1
	$(BIN)/python -m benchmarks.decode_step
	$(BIN)/python -m benchmarks.offline

.PHONY: bench-gpu
bench-gpu: $(VENV)/installed
	$(BIN)/python -m benchmarks.gpu --out benchmarks/results $(ARGS)

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "Quire needs Python 3.11 or newer: $(PYTHON) was not found" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Quire needs Python 3.11 or newer: set PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PIP) -e .
	@touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PIP) -e ".[test]"
	@touch $@ $(VENV)/installed

# Type checkers and protoc want a real folder called quire; imports at run time do not need it.
build/path/quire:
	@mkdir -p build/path
	ln -sfn ../.. $@

clean:
	rm -rf $(VENV) build *.egg-info
