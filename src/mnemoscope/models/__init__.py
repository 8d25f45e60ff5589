"""Models: build a small GPT-2, open or adapt any causal LM; the only definition of layer, site, position and cache."""

from mnemoscope.models.adapters import adapt, check_peft, is_adapted, merged, merged_weights, save_adapter
from mnemoscope.models.caches import (
    RoomyLayer,
    arguments_of,
    bytes_of,
    cache_argument,
    cache_in,
    cache_of,
    cached_columns,
    forked,
    make_room,
    select_rows,
)
from mnemoscope.models.layout import (
    SITES,
    Layout,
    Site,
    backbone_of,
    blocks_of,
    core_of,
    layout_of,
    rows_of,
    site_module,
    site_width,
    states_of,
    use_layout,
    width_of,
    with_states,
)
from mnemoscope.models.opening import context_length, end_ids, load_model
from mnemoscope.models.packaged import PACKAGED, QUANTIZED
from mnemoscope.models.passes import (
    PLAINLY,
    pass_inputs,
    position_ids,
    prompts_of_rows,
    recorded_blocks,
    replayed_blocks,
    rows_of_prompts,
    untouched_blocks,
)
from mnemoscope.models.precision import Precision, in_precision, quick_precision
from mnemoscope.models.room import batch_that_fits, bytes_of_prompt, models_that_fit
from mnemoscope.models.scratch import build_gpt2, word_tokenizer
