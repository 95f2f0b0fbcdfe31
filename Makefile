# make demo, make test, make lint: everything from a fresh clone; `make test PY=python` uses an interpreter that is set up.
PYTHON ?= python3
VENV := .venv
ifdef PY
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/installed
endif
DEMO := runs/demo

.PHONY: demo controls test slow lint board benchmarks clean

demo: $(READY)
	$(PY) train.py configs/digits/flow_matching.yaml --root $(DEMO)
	$(PY) train.py configs/digits/nsf.yaml --root $(DEMO)
	$(PY) sample.py $(DEMO)/digits-flow_matching --out $(DEMO)/flow_matching
	$(PY) sample.py $(DEMO)/digits-nsf --out $(DEMO)/nsf
	$(PY) -m evals.evaluate $(DEMO)/digits-flow_matching --protocol digits_demo
	$(PY) -m evals.evaluate $(DEMO)/digits-nsf --protocol digits_demo
	$(PY) -m evals.leaderboard $(DEMO)/digits-flow_matching $(DEMO)/digits-nsf --out $(DEMO)
	$(PY) -m evals.compare $(DEMO)/digits-flow_matching $(DEMO)/digits-nsf
	@echo
	@echo "Look at:"
	@echo "  $(DEMO)/flow_matching.png            flow matching, one class a row"
	@echo "  $(DEMO)/nsf.png                      neural spline flow"
	@echo "  $(DEMO)/leaderboard.html             both beside each other, a page for the browser (LEADERBOARD.md as text)"
	@echo "  $(DEMO)/digits-flow_matching/        configuration, log, checkpoints and results of a run"

# Rows of a board whose faults are known: what metrics make of copies, blur, noise, missing and invented digits.
CONTROLS := memorise duplicated noisy blurred gaussian

controls: $(READY)
	for name in $(CONTROLS); do $(PY) train.py configs/digits/$$name.yaml || exit 1; done
	$(PY) -m evals.evaluate $(CONTROLS:%=runs/digits-%) --protocol digits

test: $(READY)
	$(PY) -m pytest -n auto

slow: $(READY)
	$(PY) -m pytest -n auto -m slow

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

board: $(READY)
	$(PY) -m evals.leaderboard

benchmarks: $(READY)
	$(PY) -m evals.benchmarks.splines
	$(PY) -m evals.benchmarks.training_step
	$(PY) -m evals.benchmarks.autoregressive
	$(PY) -m evals.benchmarks.waveflow
	$(PY) -m evals.benchmarks.solvers
	$(PY) -m evals.benchmarks.gradients
	$(PY) -m evals.benchmarks.ffjord
	$(PY) -m evals.benchmarks.series
	$(PY) -m evals.benchmarks.image_flows
	$(PY) -m evals.benchmarks.networks
	$(PY) -m evals.benchmarks.frechet
	$(PY) -m evals.benchmarks.prdc
	$(PY) -m evals.benchmarks.agreement
	$(PY) -m evals.benchmarks.score_models
	$(PY) -m evals.benchmarks.wavelets
	$(PY) -m evals.benchmarks.field_fit

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
