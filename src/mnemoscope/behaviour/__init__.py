"""What a model does when asked: labels, pairs, and states at the decision position; the only read hook."""

from typing import TYPE_CHECKING

from mnemoscope.runs.lazily import handed_on

if TYPE_CHECKING:
    from mnemoscope.behaviour.asking import PLAIN, Asking, Encoded, Prompting, check_known, encode, left_padded
    from mnemoscope.behaviour.batches import (
        Batch,
        as_batch,
        by_length,
        kept_bytes,
        prepare,
        with_options,
        with_suffixes,
        without_prefix,
    )
    from mnemoscope.behaviour.generate import Applied, continued, cost_of, decode, phrase_of, written
    from mnemoscope.behaviour.labels import (
        PairBatch,
        Scores,
        draw_candidates,
        first_and_rest,
        log_probabilities,
        mark_confabulations,
        mine_pairs,
        only_log_probability,
        score,
        score_read,
    )
    from mnemoscope.behaviour.reading import cache_prefixes, read_only_options
    from mnemoscope.behaviour.states import KeptStates, States, capturing, read_states, states_at_the_end
    from mnemoscope.behaviour.texts import Read, next_tokens, read_behind

__getattr__, __all__ = handed_on(__name__, __file__)
