# `make` lists the targets; CONTRIBUTING.md says when to use which.
PYTHON ?= python3
NB     ?=
RUN    := .venv/bin/python -m
READY  := .venv/.ready
MIN    := $(shell sed -n 's/^min_python = //p' settings.ini)
HASHED := pip install -q --disable-pip-version-check --require-hashes --no-build-isolation
AUDIT  := pip-audit==2.10.1
STYLE  := fastaistyle==0.0.20 pyflakes==4.1.0 ty==0.0.108

# advisories that `make audit` passes over; one line each, with the reason behind it: IGNORED += --ignore-vuln PYSEC-2026-1 # only in its server
IGNORED :=

.PHONY: help demo test record replay pretrain export lab notebooks readme docs lock audit style check clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## train all readouts on the toy world and compare them with baselines (2 to 3 minutes on two cores)
	@root=results/demo-$$(date +%Y%m%d-%H%M%S) && mkdir -p $$root && \
	RESULTS_ROOT_DIR="$$PWD/$$root" $(RUN) rlhf_flant5.sweep --seeds 1 --transformer trained --jobs 2 experiment=toy desc=demo sim_man.allow_untracked=true && \
	$(RUN) rlhf_flant5.compare $$root

test: $(READY) ## run every notebook's tests, then the programs' tests
	OMP_NUM_THREADS=1 .venv/bin/nbdev_test
	OMP_NUM_THREADS=1 $(RUN) pytest -q -n 3 --dist worksteal

record: $(READY) ## write tests/trajectories.json anew: the curves that a deliberate change of the mathematics moves
	.venv/bin/python tests/test_trajectories.py record

replay: $(READY) ## compute the recorded curves again: the same to the last bit, on the machine and with the packages that recorded them
	EXACT=1 $(RUN) pytest -q -s tests/test_trajectories.py

pretrain: $(READY) ## pretrain the toy world's FLAN-T5 by its recipe (under a minute on two cores) and write the copy that the package ships
	.venv/bin/python -c 'from rlhf_flant5.backbone.toy_flan import ship_toy_flan; ship_toy_flan()'

export: $(READY) ## clean the notebooks, then write the modules from them
	.venv/bin/nbdev_clean
	.venv/bin/nbdev_export

lab: $(READY) ## the book in Jupyter, with the project's environment
	@test -x .venv/bin/jupyter-lab || { grep -ho '^[^# ]*==[^ ]*' requirements.lock >.venv/versions.txt && \
	$(RUN) pip install -q --disable-pip-version-check --constraint .venv/versions.txt "$$(sed -n 's/^lab_requirements = //p' settings.ini)"; }
	.venv/bin/jupyter-lab --notebook-dir=nbs

notebooks: $(READY) ## re-execute all notebooks in place and save their outputs (one: NB=nbs/10_data/11_pairs.ipynb)
	.venv/bin/python tools/run_notebooks.py $(NB)

readme: $(READY) ## write README.md from nbs/index.ipynb
	.venv/bin/python tools/make_readme.py

docs: $(READY) ## build the docs site in _docs (needs Quarto)
	@if command -v quarto >/dev/null; then PATH="$$PWD/.venv/bin:$$PATH" nbdev_docs && .venv/bin/python tools/make_readme.py; else \
	.venv/bin/python -c 'from nbdev.serve import proc_nbs; proc_nbs()' && \
	echo 'The pages are prepared in _proc, but not rendered: Quarto is not installed (https://quarto.org).'; fi

lock: ## write requirements*.lock after a change of settings.ini (newer versions: UPGRADE=NAME or UPGRADE=all)
	$(PYTHON) tools/lock.py $(UPGRADE)

audit: ## look the locked packages up among the known vulnerabilities
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && $(PYTHON) -m venv "$$tmp" && \
	"$$tmp/bin/python" -m pip install -q --disable-pip-version-check $(AUDIT) && \
	"$$tmp/bin/pip-audit" --strict --progress-spinner off --disable-pip --require-hashes -r requirements.lock -r requirements-cuda.lock $(IGNORED)

style: $(READY) ## lines, names and types, by checkers in an environment of their own (one that asks for another fastcore than nbdev's)
	@test -e .venv/style/.ready || { $(PYTHON) -m venv .venv/style && \
	.venv/style/bin/python -m pip install -q --disable-pip-version-check $(STYLE) && touch .venv/style/.ready; }
	bash tools/style.sh

check: $(READY) style ## what CI checks before the tests: style, notebooks clean and exported, README current, wheel installs
	PATH="$$PWD/.venv/bin:$$PATH" bash tools/check.sh

clean: ## remove caches and built files (keeps .venv and results)
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .hypothesis
	find nbs rlhf_flant5 tests tools -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

# The environment: exact versions, each file checked against its hash, then this project, editable. What builds packages from their source is installed, and
# so checked, before the rest. torch is the CPU-only build where pip, as it is configured, offers that, and else the default build.
$(READY): requirements.lock requirements-cuda.lock requirements-cpu.lock settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MIN)".split("."))))' 2>/dev/null || { \
	seen=$$($(PYTHON) -c 'import platform; print("Python " + platform.python_version())' 2>/dev/null || echo missing); \
	echo "error: Python $(MIN) or newer is needed, but $(PYTHON) is $$seen; name another one: make PYTHON=python$(MIN) $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "error: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo 'Installing the pinned packages into .venv; the first time this takes a few minutes.'
	@awk '/^(packaging|setuptools|wheel)==/, !/\\$$/' requirements.lock >.venv/build.lock && $(RUN) $(HASHED) -r .venv/build.lock
	@cpu=$$(sed -n 's/^torch==\([^ ]*\).*/\1/p' requirements-cpu.lock); \
	$(RUN) pip index versions --disable-pip-version-check torch 2>/dev/null | tr -s ', ' '\n\n' | grep -xF "$$cpu" >/dev/null && build=cpu || build=cuda; \
	$(RUN) $(HASHED) -r requirements.lock -r requirements-$$build.lock
	@$(RUN) pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --config-settings editable_mode=compat -e .
	@touch $@
