#!/usr/bin/env bash
# Build sdist and wheel into dist/, and run `quickstart` from each in an empty environment of every Python that is named:
#   bash scripts/release.sh OUT python3.11 python3.13
# PIP_ARGS: more for pip install, such as an index with another build of torch.
set -euo pipefail

out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
"${1:-python3}" -m venv "$out/build"
"$out/build/bin/pip" install --quiet build
rm -rf dist
"$out/build/bin/python" -m build --outdir dist . >"$out/build.log" 2>&1

for python in "$@"; do
  for archive in dist/*; do
    environment="$out/$(basename "$python")-${archive##*.}"
    "$python" -m venv "$environment"
    # shellcheck disable=SC2086
    "$environment/bin/pip" install --quiet ${PIP_ARGS:-} "$archive"
    began=$SECONDS
    (cd "$out" && "$environment/bin/mnemoscope" run quickstart --out "$environment/run" >"$environment.log" 2>&1)
    echo "$("$environment/bin/python" --version), $(basename "$archive"): quickstart in $((SECONDS - began)) s"
    rm -rf "$environment"
  done
done
