"""What a model does when asked: labels, pairs, and states at the decision position; the only read hook."""

from mnemoscope.behaviour.asking import Asking, Batch, Encoded, check_known, encode, left_padded, prepare
from mnemoscope.behaviour.labels import (
    TIE,
    Scores,
    log_probabilities,
    mark_confabulations,
    only_log_probability,
    score,
    score_contrasted,
)
from mnemoscope.behaviour.pairs import PairBatch, draw_candidates, mine_pairs
from mnemoscope.behaviour.prompting import PLAIN, Prompting
from mnemoscope.behaviour.reading import cache_prefixes, kept_bytes, stacked, with_option, without_prefix
from mnemoscope.behaviour.states import KeptStates, States, capturing, read_states, states_at_the_end
from mnemoscope.behaviour.writing import Applied, complete, continued, decode
