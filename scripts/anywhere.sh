#!/usr/bin/env bash
# Other processors, on one machine: the fast tests and a study under settings that round otherwise, and one table of both.
#     bash scripts/anywhere.sh [OUT [STUDY [TESTS [TRAINED]]]]
# TESTS: a target of the Makefile, or none. TRAINED: a run with models of the study, which are analysed; none are trained then.
# Needs what `make test` sets up. A run that is there already is not run again; the last line says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/anywhere} study=${2:-quickstart} tests=${3:-test-fast} models=${4:-} failed=0
settings=(
    "plain"
    "avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2"
    "avx512 ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE MKL_ENABLE_INSTRUCTIONS=AVX512"
    "bfloat16 ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 precision=bfloat16"
    "two-threads OMP_NUM_THREADS=2 threads=2"
    "jitter jitter=1e-7"
)
if [ -n "$models" ]; then # the passes of an analysis are in float32, and nothing is trained
    settings=(
        "${settings[@]:0:3}"
        "aten-avx2 ATEN_CPU_CAPABILITY=avx2"
        "aten-default ATEN_CPU_CAPABILITY=default"
        "mkl-avx2 MKL_ENABLE_INSTRUCTIONS=AVX2"
        "mkl-sse4 MKL_ENABLE_INSTRUCTIONS=SSE4_2"
        "two-threads OMP_NUM_THREADS=2 threads=2"
    )
elif grep -q amx_bf16 /proc/cpuinfo; then settings+=("amx ONEDNN_MAX_CPU_ISA=AVX512_CORE_AMX precision=bfloat16"); fi
mkdir -p "$out"
for setting in "${settings[@]}"; do
    name=${setting%% *} variables=() changes=()
    for part in ${setting#"$name"}; do
        case $part in
            threads=*) changes+=(--set "$part") ;;
            precision=* | jitter=*) changes+=("--${part}") ;;
            *) variables+=("$part") ;;
        esac
    done
    if [ -n "$models" ]; then changes+=(--models "$models"); fi
    run="$out/$name"
    if [ ! -f "$run/report.html" ]; then
        env "${variables[@]}" .venv/bin/python scripts/anywhere.py run "$study" "$run" "${changes[@]}" >"$run.log" 2>&1
        echo $? >"$run.status"
    fi
    if [ "$tests" != none ] && [ ! -f "$run.tests" ]; then
        env "${variables[@]}" make "$tests" >"$run.tests.log" 2>&1
        tail -n 1 "$run.tests.log" | tr -d '=' >"$run.tests"
    fi
    grep -q '^0$' "$run.status" || failed=1
    [ "$tests" = none ] || ! grep -Eq 'failed|error|Error' "$run.tests" || failed=1
done
.venv/bin/python scripts/anywhere.py table "$out"
[ $failed = 0 ] && echo "all passed" || echo "not all passed: see $out/*.log"
exit $failed
