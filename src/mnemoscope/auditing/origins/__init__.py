"""Every part of a long answer: from its document, from memory, or from neither."""

from typing import TYPE_CHECKING

from mnemoscope.runs.lazily import handed_on

if TYPE_CHECKING:
    from mnemoscope.auditing.origins.fitting import fit_reader, fitted_reader
    from mnemoscope.auditing.origins.labels import Labelled, labelled
    from mnemoscope.auditing.origins.reader import Origins, Reader
    from mnemoscope.auditing.origins.spans import Pool, Span, spans_of
    from mnemoscope.auditing.origins.texts import Form, Text, answered, read_texts

__getattr__, __all__ = handed_on(__name__, __file__)
