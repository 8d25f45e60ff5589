"""What a model does when asked: labels, pairs, and states at the decision position; the only read hook."""

from mnemoscope.behaviour.asking import (
    PLAIN,
    Asking,
    Batch,
    Encoded,
    Prompting,
    as_batch,
    check_known,
    encode,
    left_padded,
    prepare,
)
from mnemoscope.behaviour.labels import (
    Applied,
    Scores,
    complete,
    continued,
    decode,
    first_and_rest,
    log_probabilities,
    mark_confabulations,
    next_logits,
    only_log_probability,
    phrase_of,
    score,
    score_contrasted,
    score_read,
)
from mnemoscope.behaviour.pairs import PairBatch, draw_candidates, mine_pairs
from mnemoscope.behaviour.reading import (
    by_length,
    cache_prefixes,
    kept_bytes,
    read_only_options,
    with_options,
    with_suffixes,
    without_prefix,
)
from mnemoscope.behaviour.states import KeptStates, States, capturing, read_states, states_at_the_end
from mnemoscope.behaviour.texts import cost_of, written
