# Every target uses the `python` on PATH: activate the environment first.
# WORKERS: processes of `test`, each of a core and 2 GB. BEFORE: commit of `compare`.
WORKERS = 2
BEFORE = HEAD

.PHONY: help install check lint format types test test-slow coverage mutation compare docs faults wheel clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install:  ## the package, editable, with what development needs
	python -m pip install -e ".[dev]"

check: lint types test  ## what CI runs on every change

lint:  ## ruff, rules and format; import-linter, the floors of the house
	python -m ruff check .
	python -m ruff format --check .
	lint-imports

format:  ## mend what ruff can mend
	python -m ruff check --fix .
	python -m ruff format .

types:  ## basedpyright
	python -m basedpyright

test:  ## the fast tests: no GPU, no network, about three minutes on two cores
	python -m pytest -n $(WORKERS) --dist worksteal -m 'not slow and not gpu'

test-slow:  ## the rest of the tests that need no GPU, the very slow ones too
	python -m pytest -m 'slow and not gpu'

coverage:  ## branches of src that the tests of .ci/run reach (95 in 100 at least), and every raise
	python -m coverage erase
	python -m coverage run -m pytest -q -m 'not very_slow and not gpu'
	python -m coverage combine -q
	python -m coverage json -q -o coverage.json
	python -m tests.raises coverage.json

mutation:  ## small changes of flow, schedulers and data: a test has to fail at each (an hour)
	python -m tests.mutation.run --output benchmarks/results/mutation.md

compare:  ## what every command writes by the commit BEFORE and by this working tree, to the byte
	python -m tests.compare --before $(BEFORE)

docs:  ## the site, strictly
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict

faults:  ## kills, full disks, rotten files and hostile input, at length (root, for the disks; hours; it can be stopped)
	python -m tests.faults.run --tries 20 --kills 100 --output benchmarks/results/faults.md
	python -m tests.faults.saving --kills 50 --processes 2 --output benchmarks/results/saving.md
	python -m tests.faults.fuzz --examples 115000 --output benchmarks/results/fuzzing.md

wheel:  ## build and check dist/*.tar.gz and dist/*.whl
	python -m build
	python -m twine check --strict dist/*
	python .ci/check_wheel.py dist/*.whl

clean:
	rm -rf build dist site src/*.egg-info .pytest_cache .ruff_cache .hypothesis
