#!/usr/bin/env bash
# How the code reads, in the notebooks, the modules, the tests and the tools; run it as `make style`, which installs the checkers.
# What they pass over, and why, stands in pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/style/bin

echo '== lines, semicolons, imports'
"$bin/chkstyle" nbs tests tools setup.py

echo '== names'
"$bin/pyflakes" rlhf_flant5 tests tools setup.py

echo '== types'
"$bin/ty" check --quiet --python .venv rlhf_flant5
