# Everything happens in .venv, which the first target makes. TORCH pins a release that has a CPU build everywhere.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers>=5.17,<6
RUN = .venv/bin/python

.PHONY: demo test gpu-test lint types check bench clean

demo: .venv/ready
	$(RUN) -m training.demo

test: .venv/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

# On a machine with a GPU, with the Python that knows it.
gpu-test:
	$(PYTHON) -m pytest tests/test_kernels_*.py tests/test_checkpoints_fla_on_gpu.py

lint: .venv/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: .venv/ready
	$(RUN) -m mypy

check: lint types test

# The CPU, the GPU if there is one, and the plots.
bench: .venv/ready
	$(RUN) -m benchmarks

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet "$(TORCH)" "$(TRANSFORMERS)" --editable ".[train,test]"
	$(RUN) -m pip install --quiet --no-deps torchscale==0.3.0 # an oracle of the tests; what it depends on is not needed
	touch .venv/ready

clean:
	rm -rf .venv runs
