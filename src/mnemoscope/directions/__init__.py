"""From pairs to steering vectors: methods, controls of the same norm, and the choice of a setting."""

from mnemoscope.directions.choose import (
    CONTROLS,
    INDIFFERENCE,
    LEARNED,
    PERMUTED,
    RATING_DRAWS,
    SHUFFLED,
    Choice,
    Limits,
    TuneLists,
    control_draws,
    control_rates,
    final,
    gaussian,
    in_order,
    most_lost,
    ranked,
    refitted,
    shared_neurons,
    shuffles,
)
from mnemoscope.directions.learned import learned_together, wanted_batches
from mnemoscope.directions.sources import (
    ANSWERED,
    LOW_RANK,
    SOURCE,
    TOWARD,
    Fit,
    FitLists,
    Labels,
    Setting,
    Sources,
    Unit,
    in_turn,
    learned_beside,
    margin_gradients,
    read_sources,
    with_prefixes,
)
from mnemoscope.directions.vectors import METHODS, Directions, share_of, steered
