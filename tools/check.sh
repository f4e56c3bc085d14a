#!/usr/bin/env bash
# What CI checks after the tests; run it as `make check`, which puts the environment's python first.
set -euo pipefail
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

# the working tree as git would commit it, changed and untracked files included; git's own index stays as it is
tree() { GIT_INDEX_FILE="$tmp/index" git add --all && GIT_INDEX_FILE="$tmp/index" git write-tree; }

echo '== cleaning and exporting the notebooks changes nothing'
before=$(tree)
nbdev_clean
nbdev_export
git --no-pager diff --stat --exit-code "$before" "$(tree)" ||
  { echo 'error: the files above changed: run `make export`, then test, and commit them' >&2; exit 1; }

echo '== README.md is what nbs/index.ipynb says'
python tools/make_readme.py --check

echo '== the sdist builds, a wheel builds from it, installs in an empty environment, and runs'
python -m build --outdir "$tmp/dist" . >"$tmp/build.log" 2>&1 || { cat "$tmp/build.log" >&2; exit 1; }
python -m venv "$tmp/venv"
# versions alone: with the lock's hashes among its constraints, pip wants a hash of the wheel just built as well
grep -ho '^[^# ]*==[^ ]*' requirements.lock requirements-cuda.lock >"$tmp/versions.txt"
"$tmp/venv/bin/python" -m pip install -q --no-compile --disable-pip-version-check --constraint "$tmp/versions.txt" "$tmp"/dist/*.whl
(cd "$tmp" && venv/bin/python -m rlhf_flant5.train --help >help.txt && head -n 3 help.txt)
echo '== all checks passed'
