"""Models: build a small GPT-2, open or adapt any causal LM; the only definition of layer, site, position and cache."""

from typing import TYPE_CHECKING

from mnemoscope.runs.lazily import handed_on

if TYPE_CHECKING:
    from mnemoscope.models.caches import cache_argument, cache_of, cached_columns, forked, select_rows
    from mnemoscope.models.layout import (
        EVERY_SITE,
        SITES,
        Layout,
        Site,
        backbone_of,
        blocks_of,
        check_hookable,
        check_ran,
        core_of,
        heads_of,
        layout_of,
        rows_of,
        site_module,
        site_width,
        states_of,
        use_layout,
        width_of,
        with_states,
    )
    from mnemoscope.models.opening import context_length, end_ids, layers_of, load_model, models_that_fit, shapes_of
    from mnemoscope.models.packaged import PACKAGED, QUANTIZED, check_named
    from mnemoscope.models.passes import (
        PLAINLY,
        Precision,
        has_known_rows,
        in_precision,
        pass_inputs,
        prompts_of_rows,
        quick_precision,
        replaced_forward,
        with_last_logits,
    )
    from mnemoscope.models.room import batch_that_fits
    from mnemoscope.models.trainable import adapt, build_gpt2, check_peft, is_adapted, merged_weights, word_tokenizer

__getattr__, __all__ = handed_on(__name__, __file__)
