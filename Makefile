# Everything a fresh clone needs, in one command each: `make demo`, `make test`,
# and on a machine with an NVIDIA GPU `make gpu`.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: setup demo test zoo lint types docs bench gpu clean

setup: $(READY)

# One torch of the range in pyproject.toml is installed first and alone, with the Triton that
# belongs to it, so that nothing else pulls in a second one; where pip is offered a plain CPU build,
# that is the one it takes. The snapshots of generated code are of this one.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=25" "setuptools>=77" wheel
	$(BIN)/python -m pip install -q "torch>=2.11,<2.14" "triton>=3.6,<3.8; sys_platform == 'linux'"
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[all]"
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/digits/demo.py --out demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The package is type-checked as it is installed, because `passes` and `lowering` are inside it
# only then.
types: $(READY)
	rm -rf build
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation --target build/types .
	cd build && MYPYPATH=types ../$(BIN)/mypy --config-file ../pyproject.toml -p omniq_compile

# Whole files go to each worker: some share a costly set-up. One thread each, as there are others.
WORKERS ?= 2
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Without a network; tests/test_docs.py builds it too, and runs what it shows.
docs: $(READY)
	$(BIN)/mkdocs build --strict

# Every transformer class of diffusers, and the long runs that `make test` leaves out.
zoo: $(READY)
	$(BIN)/python -m pytest -m zoo -n $(WORKERS)

bench: $(READY)
	$(BIN)/omniq bench

# A failing check or variant must not keep the figures of the others from being written. The checks
# spend most of their time compiling: WORKERS=8 suits a machine with 16 cores.
gpu: $(READY)
	OUTCOMES=docs/benchmarks/gpu-checks.txt $(BIN)/python -m pytest tests/gpu -n $(WORKERS); checked=$$?; \
	$(BIN)/omniq bench --suite h200 --jobs $(WORKERS) --report docs/benchmarks && exit $$checked

clean:
	rm -rf $(VENV) build demo *.egg-info
