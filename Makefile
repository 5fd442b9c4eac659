# make demo | test | lab | docs | clean. Each makes .venv when it is missing or out of date; README.md has the plain commands.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test lab docs clean env
.DEFAULT_GOAL := demo

demo: env  ## paint a photograph in a style: run lesson 33 from top to bottom
	@.venv/bin/course run 33_style_transfer --out out/demo
	@echo "To go through the lessons yourself, type: make lab"

test: env  ## everything that must hold: repository checks, all notebooks, pytest
	@$(PY) tools/test.py

lab: env  ## open the lessons in JupyterLab
	@$(PY) -m jupyterlab $(ARGS) nbs/index.ipynb

docs:  ## build the site into _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "Stopped: the site is built by Quarto, which is not on PATH: install it from https://quarto.org, then repeat make docs." >&2; exit 1; }
	@$(PYTHON) tools/environment.py
	@PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) tools/docs.py

clean:  ## remove what was made, except .venv and the checkpoints of long trainings
	@rm -rf _proc _docs nbs/out build dist *.egg-info .pytest_cache .quarto nbs/nbdev.yml nbs/sidebar.yml
	@if [ -d out ]; then find out -mindepth 1 -maxdepth 1 ! -name 'train_*' -exec rm -rf {} +; rmdir out 2>/dev/null || true; fi
	@find nbs course_lib tests tools \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
	@echo "Clean. The environment stays, and so do checkpoints of course train; to remove them too: rm -rf .venv out"

env:
	@$(PYTHON) tools/environment.py
