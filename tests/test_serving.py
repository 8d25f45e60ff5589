"""The parts of the vLLM plugin that need no vLLM; ``scripts/vllm_cpu.sh`` runs the rest inside vLLM."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from served import random_run

from mnemoscope.errors import InputError
from mnemoscope.serving.asking import ADMITTED, Admitted, Asked, admit, key_of_block, parse
from mnemoscope.serving.offered import Offered
from mnemoscope.serving.rows import rows_of
from mnemoscope.steering import Binding
