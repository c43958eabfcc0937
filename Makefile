# What this project can do; `make` alone lists it. Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
# Notebooks and tools find `scimlora` and nbdev's commands in the environment.
IN_ENV = PATH="$$PWD/$(BIN):$$PATH"
# The newest torch brings gigabytes of CUDA packages where this one, built for the CPU, may lie at hand.
TORCH = 2.13.0
DEPS = settings.ini setup.py pyproject.toml constraints.txt

.PHONY: help install install-dev demo test export notebooks docs readme colab ui mini blood bench bench-gpu bench-tiles bench-large benchmark-science benchmark-panels bench-unknown bench-conformal bench-forgetting reports bench-coverage bench-share bench-merging bench-retrieval bench-settings bench-serve bench-servers test-serve bench-fuzz constraints clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

install: $(VENV)/demo.stamp  ## make .venv with scimlora, all that the demo needs
$(VENV)/demo.stamp: $(DEPS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[demo]"
	touch $@

install-dev: $(VENV)/dev.stamp  ## the same with all that tests, docs and the page need
$(VENV)/dev.stamp: $(DEPS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/demo.stamp

demo: install  ## the whole job on real cells: tune, measure, report
	$(BIN)/scimlora demo

# Two at a time with one thread each: nbdev would start a worker for every core, and torch a thread for every core in each. numba's threads,
# which scanpy starts, share a library with torch's and would make these as many.
ONE_THREAD = OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1
test: install-dev  ## the demo, every notebook, every test
	$(BIN)/scimlora demo
	$(IN_ENV) $(ONE_THREAD) nbdev_test --n_workers 2
	$(IN_ENV) $(ONE_THREAD) python -m pytest -n 2 --dist loadfile

export: install-dev  ## notebooks to modules, and both notebook folders clean
	$(IN_ENV) nbdev_export
	$(IN_ENV) nbdev_clean
	$(IN_ENV) nbdev_clean --fname colab

notebooks: install-dev  ## run all notebooks and save what they print
	$(IN_ENV) python tools/run_notebooks.py

docs: install-dev  ## build the site into _docs/ and check it
	$(IN_ENV) python tools/check_imports.py
	$(IN_ENV) python tools/build_docs.py
	$(IN_ENV) python tools/check_site.py

readme: install-dev  ## draw the pictures and write README.md from nbs/index.ipynb
	$(IN_ENV) python tools/make_card.py
	$(IN_ENV) python tools/make_readme.py

colab: install-dev  ## run the Colab notebooks headless, with papermill
	$(IN_ENV) $(ONE_THREAD) python colab/run.py --workers 2 $(NOTEBOOKS)

ui: install-dev  ## open the page on http://localhost:8501
	$(IN_ENV) streamlit run ui/src/streamlit_app.py

mini: install-dev  ## pretrain the embedded base again, with its held-out numbers
	SCIMLORA_PROGRESS=1 $(BIN)/python -c 'from scimlora.pretrain import make_mini; make_mini()'

blood: install-dev  ## tune the embedded bundle for blood again, with its held-out numbers (about 15 minutes)
	SCIMLORA_PROGRESS=1 $(BIN)/python -c 'from scimlora.blood import make_blood; make_blood()'

# No index is named, so none is written. CUDA packages stay out: only builds that need them ask for them.
bench-large: demo install-dev  ## a million cells through prepare and annotate: benchmarks/LARGE.md
	$(IN_ENV) python benchmarks/large_files.py

# CellTypist needs an older scikit-learn than scimlora is tested with: its own environment, spoken to in plain files.
PEERS = .venv-peers
$(PEERS)/made.stamp: benchmarks/requirements-peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -q -r $<
	touch $@

bench: install-dev $(PEERS)/made.stamp  ## speed and memory beside SCimilarity, CellTypist and scikit-learn: benchmarks/RESULTS.md
	$(IN_ENV) python benchmarks/speed.py --peers $(PEERS) $(ARGS)

bench-gpu: install-dev  ## embedding on a graphics card, where there is one: benchmarks/GPU.md
	$(IN_ENV) python benchmarks/gpu.py $(ARGS)

bench-tiles: install-dev  ## products on matrix units by the registers in use, where there are such units: prints a table
	$(IN_ENV) python benchmarks/tile_registers.py

benchmark-science: install-dev $(PEERS)/made.stamp  ## methods against tuned peers on held-out donors, goes on where it stopped: benchmarks/SCIENCE.md
	$(IN_ENV) OMP_NUM_THREADS=1 python benchmarks/science.py $(ARGS)

benchmark-panels: install-dev  ## accuracy against the number of genes measured: benchmarks/PANELS.md
	$(IN_ENV) OMP_NUM_THREADS=1 python benchmarks/panels.py $(ARGS)

bench-unknown: install-dev  ## scores for cells of an untaught kind: benchmarks/UNKNOWN.md
	$(IN_ENV) OMP_NUM_THREADS=1 SCIMLORA_PROGRESS=1 python benchmarks/unknown_cells.py

bench-conformal: install-dev  ## how often prediction sets hold the true label, on held-out donors: benchmarks/CONFORMAL.md
	$(IN_ENV) OMP_NUM_THREADS=1 python benchmarks/conformal.py $(ARGS)

bench-forgetting: install-dev  ## what a base forgets when it is taught, by strength of the adapter: benchmarks/FORGETTING.md
	$(IN_ENV) OMP_NUM_THREADS=1 python benchmarks/forgetting.py $(ARGS)

reports: install-dev  ## the Design Analysis Reports of brain, pancreas and blood: benchmarks/reports
	$(IN_ENV) OMP_NUM_THREADS=1 python benchmarks/reports.py $(ARGS)

bench-coverage: install-dev  ## when the gene path reads the embedding, on held-out cells that no benchmark reports: benchmarks/COVERAGE.csv
	$(IN_ENV) OMP_NUM_THREADS=1 python benchmarks/embedding_share.py $(ARGS)

bench-share: install-dev  ## the encoder's share and other temperatures, on held-out cells that no benchmark reports: benchmarks/SHARE.csv
	$(IN_ENV) OMP_NUM_THREADS=1 python benchmarks/encoder_share.py $(ARGS)

bench-merging: install-dev  ## bundles of four tissues made one, in several ways: benchmarks/MERGING.md
	$(IN_ENV) OMP_NUM_THREADS=1 python benchmarks/merging.py $(ARGS)

bench-retrieval: install-dev  ## finding terms by words and by meaning: benchmarks/RETRIEVAL.md
	$(IN_ENV) OMP_NUM_THREADS=1 python benchmarks/retrieval.py $(ARGS)

bench-settings: install-dev  ## settings on held-out cells that no benchmark reports: benchmarks/SETTINGS.csv
	$(IN_ENV) OMP_NUM_THREADS=1 python benchmarks/settings.py $(ARGS)

bench-fuzz: install-dev  ## 2,000 broken and malicious files: benchmarks/FUZZ.md
	$(IN_ENV) python benchmarks/fuzz_files.py --n 2000 --seed 0

bench-serve: install-dev  ## the service under load with a model of v1.1's shape: benchmarks/SERVICE.md
	$(IN_ENV) OMP_NUM_THREADS=1 python benchmarks/serve_load.py $(ARGS)

bench-servers: install-dev  ## uvicorn against granian, under load and slow clients: benchmarks/SERVERS.md
	$(IN_ENV) python benchmarks/servers.py

test-serve: install-dev  ## the service's tests in their long form: 60 s of 64 clients, 1,000 whole cells, more generated requests
	$(IN_ENV) SCIMLORA_LONG=1 python -m pytest tests/test_service.py

constraints: install-dev  ## pin the newest versions that work together
	$(BIN)/python -m pip install -q uv
	echo "torch==$(TORCH)" | $(BIN)/uv pip compile -q --universal --python-version 3.10 --no-header --no-annotate \
	  --all-extras setup.py - > $(VENV)/pins.txt
	echo '# Exact versions that work together on Python 3.10 to 3.13, made by `make constraints`.' > constraints.txt
	grep -vE '^(nvidia|cuda|triton)' $(VENV)/pins.txt >> constraints.txt

clean:  ## remove what was built; .venv stays
	rm -rf _docs _proc runs build dist *.egg-info .pytest_cache .ruff_cache
	find scimlora tools tests ui colab nbs -name __pycache__ -type d -prune -exec rm -rf {} +
