"""P(memorized) of a prompt before it is answered, and gates that steer by it.

``fitting`` is imported by itself: it needs scikit-learn, and reading saved detectors does not.
"""

from mnemoscope.detect.detector import Detector, Reading
