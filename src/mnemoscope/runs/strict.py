"""The one way to read text, YAML and JSON: limits (of tables too), no repeated keys, one meaning for each value, types.

Whatever is wrong with a file is one InputError that names it.
"""

from __future__ import annotations

import json
import os
import re
import stat
import types
from collections.abc import Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NotRequired, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

import yaml

from mnemoscope.runs.errors import InputError

Kind = TypeVar("Kind")
MOST_TEXT = 2**30  # bytes of a file of rows
MOST_JSON = 2**28  # of a file of facts; results of a study with many cells are a few MiB
MOST_YAML = 2**20
MOST_CELLS = 2**28  # of a table, rows times columns: a few bytes may stand for any number of equal ones
MOST_NODES = 50_000  # of a YAML text, aliases expanded: the largest study has a thousand
DEEPEST = 64  # nesting of YAML

NULL, BOOL, INT, FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float"))
# YAML 1.2: `no` is a text, 1:30 is no number, 1e-3 is one.
CORE = {
    NULL: r"~|null|Null|NULL|",
    BOOL: r"true|True|TRUE|false|False|FALSE",
    INT: r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    FLOAT: r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_MERGE = "tag:yaml.org,2002:merge"


def read_text(path: Path, what: str = "file", most: int = MOST_TEXT, encoding: str = "utf-8") -> str:
    """The text of a file, with the errors of ``read_bytes``; also where it is no text."""
    try:
        return read_bytes(path, what, most).decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{what}: {path} cannot be read ({error})") from error


def read_bytes(path: Path, what: str = "file", most: int = MOST_TEXT) -> bytes:
    """The bytes of a regular file; InputError names it as ``what`` where it is none, too large, or not readable."""
    try:
        # A pipe would be waited for, a device has no end.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"{what}: {path} is no regular file")
            if found.st_size > most:
                raise InputError(f"{what}: {path} has {found.st_size} bytes; at most {most} are read")
            return file.read()
    except OSError as error:
        raise InputError(f"{what}: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what}: {str(path)!r} is no path ({error})") from error


def bounded_table(path: Path, content: bytes | None = None) -> Any:
    """What to read a Parquet file from, itself or its bytes; InputError where it claims too many rows to be held."""
    from pyarrow import parquet

    found = parquet.read_metadata(path if content is None else BytesIO(content))
    if found.num_rows * found.num_columns > MOST_CELLS:
        size = f"{found.num_rows} rows of {found.num_columns} columns"
        raise InputError(f"file: {path} has {size}; at most {MOST_CELLS} cells are read")
    return path if content is None else BytesIO(content)


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """The object in a JSON file, checked to be of a type: a TypedDict (more keys are allowed) or a generic.

    Raises:
        InputError: it cannot be read, or a field is missing or of another type; the file and the field are named.
    """
    return checked(parse_json(read_text(path, most=MOST_JSON), str(path)), kind, str(path))


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; InputError where it is none, repeats a key, or holds half a character."""
    try:
        found = json.loads(text, object_pairs_hook=_unrepeated)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half of a pair by itself is no character, and cannot be written
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise InputError(f"{where}: not JSON ({error.msg} at {line}column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON that can be read ({_reason(error)})") from error


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, by the core schema of YAML 1.2.

    Raises:
        InputError: it is no YAML, repeats a key, is too long, too deep, or too large once its aliases are expanded.
    """
    if len(text) > MOST_YAML:
        raise InputError(f"{where}: {len(text)} characters; at most {MOST_YAML} are read")
    try:
        text.encode()
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{where}{line}: not YAML ({getattr(error, 'problem', None) or 'malformed'})") from error
    except Exception as error:  # constructors of damaged values have many kinds
        raise InputError(f"{where}: not YAML that can be read ({_reason(error)})") from error


def dump_yaml(value: Any) -> str:
    """YAML that ``parse_yaml`` reads back as the same value."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def checked(value: Any, kind: Any, where: str) -> Any:
    """The value itself, if it is of a type; InputError names the field, the value and the type.

    True is no number, a number is no text. Lists stand for tuples. Types that are not known here accept everything.
    """
    wrong = _mismatch(value, kind)
    if wrong is None:
        return value
    path, found, wanted = wrong
    shown = repr(found)
    got = "is missing" if found is _MISSING else f"is {shown if len(shown) <= 80 else shown[:77] + '...'}"
    raise InputError(f"{where}{': ' + path if path else ''} {got}; {wanted} is wanted")


_MISSING = object()
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "an object"}
_Mismatch = tuple[str, Any, str]  # the field, what is there, what is wanted


def _mismatch(value: Any, kind: Any) -> _Mismatch | None:
    """The first field that does not fit; None where all do."""
    origin, arguments = get_origin(kind), get_args(kind)
    if is_typeddict(kind):
        return _mismatch_of_object(value, kind)
    if kind is None or kind is type(None):
        return None if value is None else ("", value, "null")
    if kind in _NAMES:
        is_bool = isinstance(value, bool)
        fits = is_bool if kind is bool else isinstance(value, (int, float) if kind is float else kind) and not is_bool
        return None if fits else ("", value, _NAMES[kind])
    if origin is Literal:
        fits = any(type(value) is type(allowed) and value == allowed for allowed in arguments)
        return None if fits else ("", value, "one of " + ", ".join(map(str, arguments)))
    if origin in (Union, types.UnionType):
        wrong = [_mismatch(value, one) for one in arguments]
        deepest = max((found for found in wrong if found), key=lambda found: len(found[0]), default=None)
        if None in wrong or deepest is None:
            return None
        return deepest if deepest[0] else ("", value, " or ".join(dict.fromkeys(found[2] for found in wrong if found)))
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            return "", value, "a list"
        parts: Any = ((str(place), one, arguments[0]) for place, one in enumerate(value))
    elif origin in (dict, Mapping):
        if not isinstance(value, dict):
            return "", value, "an object"
        parts = ((str(name), one, arguments[1]) for name, one in value.items())
    else:
        return None
    return _first_of(parts)


def _mismatch_of_object(value: Any, kind: Any) -> _Mismatch | None:
    if not isinstance(value, dict):
        return "", value, "an object"
    hints = {name: (get_origin(one) is NotRequired, one) for name, one in _hints(kind).items()}
    for name, (may_lack, one) in hints.items():
        if not may_lack and name not in value:
            return name, _MISSING, _NAMES.get(one, "a value")
    there = ((name, may_lack, one) for name, (may_lack, one) in hints.items() if name in value)
    return _first_of((name, value[name], get_args(one)[0] if may_lack else one) for name, may_lack, one in there)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    # `__required_keys__` knows nothing of NotRequired in a module with postponed annotations.
    return get_type_hints(kind, include_extras=True)


def _first_of(parts: Any) -> _Mismatch | None:
    for name, value, kind in parts:
        if wrong := _mismatch(value, kind):
            return (f"{name}.{wrong[0]}" if wrong[0] else name), wrong[1], wrong[2]
    return None


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeEncodeError):
        return "half of a character that takes two"
    return (str(error).splitlines() or [type(error).__name__])[0]


class _Resolver(yaml.resolver.BaseResolver):
    """The core schema of YAML 1.2, and merge keys."""


for _tag, _pattern in CORE.items():
    _Resolver.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), None)
_Resolver.add_implicit_resolver(_MERGE, re.compile(r"^<<$"), ["<"])


class _Loader(yaml.SafeLoader):
    """Refuses repeated keys, deep nesting, and texts that are large once their aliases are expanded."""

    yaml_implicit_resolvers = _Resolver.yaml_implicit_resolvers

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes, self._depth, self._sizes = 0, 0, dict[int, int]()

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node, counting it as if aliases were written out."""
        is_alias, before = self.check_event(yaml.AliasEvent), self._nodes
        event = self.peek_event()
        self._depth, self._nodes = self._depth + 1, self._nodes + 1
        if self._depth > DEEPEST:
            self._refuse(event, f"nested more than {DEEPEST} deep")
        node = super().compose_node(parent, index)
        if not is_alias:
            self._sizes[id(node)] = self._nodes - before
        elif id(node) in self._sizes:
            self._nodes += self._sizes[id(node)]
        else:
            self._refuse(event, "an alias inside what it stands for")
        self._depth -= 1
        if self._nodes > MOST_NODES:
            self._refuse(event, f"more than {MOST_NODES} values, with aliases written out")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A mapping without repeated keys; InputError of the YAML library otherwise."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        """A scalar; UnicodeEncodeError where it holds half a character."""
        value = super().construct_scalar(node)
        value.encode()
        return value

    def _refuse(self, event: Any, why: str) -> None:
        raise yaml.composer.ComposerError(None, None, why, event.start_mark)

    def _integer(self, node: Any) -> int:
        return int(self.construct_scalar(node), 0 if "0o" in node.value or "0x" in node.value else 10)

    def _number(self, node: Any) -> float:
        return float(re.sub(r"^([-+]?)\.(?=[iInN])", r"\1", self.construct_scalar(node)))


_Loader.add_constructor(INT, _Loader._integer)
_Loader.add_constructor(FLOAT, _Loader._number)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would read as something else than text."""


_Dumper.add_implicit_resolver(INT, re.compile(rf"^(?:{CORE[INT]})$"), list("-+0123456789"))
_Dumper.add_implicit_resolver(FLOAT, re.compile(rf"^(?:{CORE[FLOAT]})$"), list("-+.0123456789"))
