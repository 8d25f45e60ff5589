"""Models: build a small GPT-2, open or adapt any causal LM; the only definition of layer, site, position and cache."""

from mnemoscope.models.adapters import adapt, check_peft, is_adapted, merged, save_adapter
from mnemoscope.models.caches import (
    RoomyLayer,
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
from mnemoscope.models.opening import context_length, load_model
from mnemoscope.models.packaged import PACKAGED
from mnemoscope.models.passes import pass_inputs, position_ids, recorded_blocks, replayed_blocks, untouched_blocks
from mnemoscope.models.scratch import build_gpt2, word_tokenizer

__all__ = [
    "PACKAGED",
    "SITES",
    "Layout",
    "RoomyLayer",
    "Site",
    "adapt",
    "backbone_of",
    "blocks_of",
    "build_gpt2",
    "cache_argument",
    "cache_in",
    "cache_of",
    "cached_columns",
    "check_peft",
    "context_length",
    "core_of",
    "forked",
    "is_adapted",
    "layout_of",
    "load_model",
    "make_room",
    "merged",
    "pass_inputs",
    "position_ids",
    "recorded_blocks",
    "replayed_blocks",
    "rows_of",
    "save_adapter",
    "select_rows",
    "site_module",
    "site_width",
    "states_of",
    "untouched_blocks",
    "use_layout",
    "width_of",
    "with_states",
    "word_tokenizer",
]
