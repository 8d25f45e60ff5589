"""YAML by the core schema of version 1.2, with limits: `no` is a text, 1:30 is no number, 1e-3 is one."""

from __future__ import annotations

import math
import re
from io import StringIO
from itertools import chain
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import ComposerError, MaxDepthExceededError
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from mnemoscope.runs.errors import InputError, first_line

MOST_YAML = 2**20  # characters
MOST_NODES = 50_000  # of a text, aliases written out: the largest study has a thousand
DEEPEST = 64  # nesting
# What is not quoted: version 1.1 reads texts like yes, 1:30 and 0o17 as something else.
PLAIN = re.compile(r"(?!(?:y|n|yes|no|on|off)$)[a-z/].*|\d+-\d+", re.IGNORECASE)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; dates are texts.

    Raises:
        InputError: it is no YAML, repeats a key, is too long, too deep, or too large once its aliases are expanded.
    """
    if len(text) > MOST_YAML:
        raise InputError(f"{where}: {len(text)} characters; at most {MOST_YAML} are read")
    try:
        text.encode()
        return _yaml().load(text)
    except (MaxDepthExceededError, RecursionError) as error:
        raise InputError(f"{where}: not YAML that can be read (nested more than {DEEPEST} deep)") from error
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{where}{line}: not YAML ({error.problem or 'malformed'})") from error
    except Exception as error:  # constructors of damaged values have many kinds
        raise InputError(f"{where}: not YAML that can be read ({first_line(error)})") from error


def dump_yaml(value: Any) -> str:
    """YAML that ``parse_yaml``, and a reader of version 1.1, read back as the same value."""
    out = StringIO()
    _yaml().dump(value, out)
    return out.getvalue()


class _Constructor(SafeConstructor):
    """Refuses what is too large once aliases are written out before it makes anything of it."""

    def construct_document(self, node: Node) -> Any:
        """The value of a document."""
        _size(node, {})
        return super().construct_document(node)


def _size(node: Node, sizes: dict[int, float]) -> float:
    """Number of values in a node, aliases written out; infinite inside itself."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = math.inf
    parts = chain.from_iterable(node.value) if isinstance(node, MappingNode) else node.value
    if isinstance(node, ScalarNode):
        node.value.encode()  # no half of a character
        parts = ()
    total = 1 + sum(_size(part, sizes) for part in parts)
    if total > MOST_NODES:
        what = "an alias inside what it stands for" if math.isinf(total) else f"more than {MOST_NODES} values"
        raise ComposerError(None, None, f"{what}, with aliases written out", node.start_mark)
    sizes[id(node)] = total
    return total


class _Representer(SafeRepresenter):
    """Quotes texts that are something else in version 1.1, and gives floats like 1e-3 a point, else texts there."""

    def text(self, data: str) -> Any:
        """The node of a text."""
        style = '"' if not data.isprintable() else None if PLAIN.fullmatch(data) else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def number(self, data: float) -> Any:
        """The node of a float."""
        node = self.represent_float(data)
        node.value = re.sub(r"^(-?\d+)e", r"\1.0e", node.value)
        return node


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)
_Representer.add_representer(str, _Representer.text)
_Representer.add_representer(float, _Representer.number)


def _yaml() -> YAML:
    made = YAML(typ="safe", pure=True)
    made.Constructor, made.Representer = _Constructor, _Representer
    made.default_flow_style, made.width, made.max_depth = False, 80, DEEPEST
    made.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return made
