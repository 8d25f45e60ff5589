"""What a model does when asked: labels, pairs, and states at the decision position; the only read hook."""

from mnemoscope.behaviour.asking import (
    Asking,
    Batch,
    Chat,
    Encoded,
    all_said,
    check_known,
    encode,
    left_padded,
    prepare,
)
from mnemoscope.behaviour.contrasting import score_contrasted
from mnemoscope.behaviour.labels import (
    TIE,
    Applied,
    Scores,
    decode,
    log_probabilities,
    mark_confabulations,
    only_log_probability,
    read_states,
    score,
)
from mnemoscope.behaviour.pairs import PairBatch, draw_candidates, mine_pairs
from mnemoscope.behaviour.reading import cache_prefixes, kept_bytes, stacked, with_option, without_prefix

__all__ = [
    "TIE",
    "Applied",
    "Asking",
    "Batch",
    "Chat",
    "Encoded",
    "PairBatch",
    "Scores",
    "all_said",
    "cache_prefixes",
    "check_known",
    "decode",
    "draw_candidates",
    "encode",
    "kept_bytes",
    "left_padded",
    "log_probabilities",
    "mark_confabulations",
    "mine_pairs",
    "only_log_probability",
    "prepare",
    "read_states",
    "score",
    "score_contrasted",
    "stacked",
    "with_option",
    "without_prefix",
]
