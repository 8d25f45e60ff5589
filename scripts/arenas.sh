#!/usr/bin/env bash
# The six arenas of docs/arena.py, one after the other, with the options they need to have forty test groups.
#     bash scripts/arenas.sh SEED MEMOTRAP.csv PARAREL OUT
# The data are as published: a CSV of MemoTrap, and a folder of ParaRel with facts/ and patterns/. A killed arena goes on.
set -euo pipefail
seed=$1 memotrap=$2 pararel=$3 out=$4
arena() {  # NAME MODEL TASK [OPTION...]
    local name=$1 model=$2 task=$3 options=()
    shift 3
    for option in "$@"; do options+=(--option "$option"); done
    mnemoscope arena "$model" --task "$task" "${options[@]}" --dtype bfloat16 --size "seed=$seed" -o "$out/$name"
}
# The models know 77 and 152 proverbs that do not say their own ending, so half of them or more are for test.
arena smollm2-memotrap smollm2 memotrap "file=$memotrap" 'shares=[0.25,0.2,0.55]'
arena gemma-memotrap gemma3-270m memotrap "file=$memotrap" 'shares=[0.3,0.2,0.5]'
# Relations of which enough is known.
known='relations=["P103","P20","P30","P36","P37"]' apart='held_out_relations=["P495"]'
arena smollm2-pararel smollm2 pararel "folder=$pararel" "$known" "$apart"
arena gemma-pararel gemma3-270m pararel "folder=$pararel" "$known" "$apart"
# Gemma knows three continents, too few for a relation that is held out.
both='relations=["capital","language"]'
arena smollm2-facts smollm2 facts "$both" 'held_out_relations=["continent"]'
arena gemma-facts gemma3-270m facts "$both" 'shares=[0.4,0.2,0.4]'
