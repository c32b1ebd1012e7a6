SHELL := /bin/bash
PIP := .venv/bin/python -m pip --disable-pip-version-check
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

.PHONY: venv demo test check docs wheel wheel-check bench web

venv: .venv/stamp

# torch goes in alone, so that a local build of it, or the one from the index, is settled first.
.venv/stamp: pyproject.toml constraints.txt
	@if ! $(PIP) --version >/dev/null 2>&1; then \
		for python in python3 python3.12 python3.11; do \
			if $$python -c '$(SUITABLE)' >/dev/null 2>&1; then found=$$python; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "make venv: no Python 3.11 or 3.12 with its venv module is on the PATH; install one." >&2; \
			exit 1; \
		fi; \
		echo "Making .venv with $$($$found --version)."; \
		$$found -m venv --clear .venv; \
	fi
	@echo "Installing torch 2.13.0; where it has to be downloaded, this takes minutes."
	@$(PIP) install -qq -c constraints.txt torch==2.13.0
	@echo "Installing attnspan, what it needs, and the tools for its development."
	@$(PIP) install -qq -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "Ready: .venv/bin/attnspan"

demo: venv
	.venv/bin/python -m attnspan demo

# Two at a time; threads that wait sleep, since both share the processor's cores.
test: venv
	OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -n 2 --dist worksteal

check: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	.venv/bin/lint-imports
	.venv/bin/python -m pytest --doctest-modules src
	@$(MAKE) --no-print-directory docs

# Without a network; what is made from the code must be current (`python docs/generate.py` makes it).
docs: venv
	.venv/bin/python docs/generate.py --check
	.venv/bin/python -m sphinx -W --keep-going -q docs docs/_build
	@echo "Built: docs/_build/index.html"

# Without a network: the tools that build it are those of the environment.
wheel: venv
	@rm -rf build dist
	.venv/bin/python -m build --wheel --no-isolation --outdir dist . >/dev/null
	@ls -l dist/*.whl

# The wheel alone, in an environment of its own outside of the checkout. What it depends on is lent from
# .venv, since torch is large; WHOLE=1 installs all of that too.
wheel-check: wheel
	.venv/bin/python tests/wheel_check.py dist/*.whl $(if $(WHOLE),--whole)

bench: venv
	@set -e; for name in startup cpu step_cost quality kill_resume million; do \
		echo "benchmarks/$$name.py"; .venv/bin/python "benchmarks/$$name.py"; \
	done

# The explorer's front end, built into the package; needs node 20 or later and npm. What it builds is
# committed, so that nobody else needs them.
web: venv
	.venv/bin/python web/measured.py
	cd web && npm ci --no-audit --no-fund && npm run build
