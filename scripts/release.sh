#!/usr/bin/env bash
# Build sdist and wheel into dist/, and run `quickstart` from each in an empty environment of every Python that is named, from
# the wheel as `pipx run` does:
#   bash scripts/release.sh OUT python3.11 python3.13
# PIP_ARGS: more for pip install, such as an index with another build of torch.
set -euo pipefail

out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
"${1:-python3}" -m venv "$out/build"
"$out/build/bin/pip" install --quiet build pipx
rm -rf dist
"$out/build/bin/python" -m build --outdir dist . >"$out/build.log" 2>&1
export PIPX_HOME="$out/pipx" PIPX_BIN_DIR="$out/pipx/bin"

for python in "$@"; do
  for archive in "$PWD"/dist/*; do
    environment="$out/$(basename "$python")-${archive##*.}"
    run=(mnemoscope run quickstart --out "$environment-run")
    began=$SECONDS
    if [ "${archive##*.}" = whl ]; then
      starts="$out/build/bin/pipx run --quiet --no-cache --python $python --spec $archive"
      # shellcheck disable=SC2086
      (cd "$out" && $starts ${PIP_ARGS:+"--pip-args=$PIP_ARGS"} "${run[@]}" >"$environment.log" 2>&1)
    else
      "$python" -m venv "$environment"
      # shellcheck disable=SC2086
      "$environment/bin/pip" install --quiet ${PIP_ARGS:-} "$archive"
      (cd "$out" && "$environment/bin/${run[0]}" "${run[@]:1}" >"$environment.log" 2>&1)
    fi
    "$python" --version | sed "s|$|, ${archive##*/}: installed, and quickstart run, in $((SECONDS - began)) s|"
    rm -rf "$environment" "$PIPX_HOME"
  done
done
