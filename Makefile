# The README's two commands, `make demo` and `make test`; both make .venv first, and use it again once it is complete.
PYTHON ?= python3
RUN = .venv/bin/python
MADE = .venv runs dist build .mypy_cache .ruff_cache

.PHONY: demo test check clean python

demo: python
	@$(PYTHON) environment.py plot cli
	@$(RUN) -m nestling demo

test: python
	@$(PYTHON) environment.py dev kernels-test
	@./check.sh tests

check: python
	@$(PYTHON) environment.py dev kernels-test
	@./check.sh

clean:
	@for made in $(MADE); do if [ -e $$made ]; then echo "removing $$made"; rm -r $$made; fi; done
	@find . -name __pycache__ -type d -prune -print -exec rm -r {} + | sed 's/^/removing /'

python:
	@command -v $(PYTHON) >/dev/null || { echo "nestling: no program $(PYTHON): install Python 3.11 or newer, or run make PYTHON=/path/to/python3" >&2; exit 1; }
