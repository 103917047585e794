"""The wire format: which values cross between the judge and a solution, and in which bytes.

- None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, range, Decimal, Fraction, date, time,
  datetime (without a time zone, or with a fixed offset) and timedelta cross as they are, in both directions.
- A result may also be a Counter, OrderedDict or defaultdict, which arrives as the dict it equals; a namedtuple, which
  arrives as a tuple; a numpy scalar, as a Python number; or a numpy array, as nested lists.
- Nothing else crosses: not an instance of a class, nor of a subclass of the types above, nor a generator.

A solution writes length-framed JSON. Lists, strings, numbers, booleans and None are themselves; every other type is an
object with one key, which names the type. The decoder knows these few names and nothing else, so hostile bytes become a
plain value or a `ValueError`, never code. Size, depth and number of items are bounded. The judge writes marshal to a
solution where the value consists of types that marshal has, else JSON too. The caller sends programs to the judge as
marshal, of any size.

Not covered here: what the messages mean (judge.py, solution.py).
"""

import collections
import datetime
import json
import marshal
import os
import sys
import types
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from math import isfinite
from typing import Any

MAX_BYTES = 16 << 20  # one frame
MAX_ITEMS = 2_000_000  # values in one frame, containers included
MAX_DEPTH = 100  # containers within containers
SMALL_INT = 1 << 63  # larger integers travel in hexadecimal, which converts in linear time

_dumps = json.JSONEncoder(ensure_ascii=False).encode  # of strings and numbers: `_text` writes what contains them


class CannotCross(Exception):
    """Raised for a value that is not plain data or is too large to send."""


def encode(value: Any, exact: bool = False) -> bytes:
    """Return `value` as bytes.

    Args:
        value: Any value.
        exact (`bool`, defaults to `False`): Refuse types that would arrive as another.

    Raises:
        `CannotCross`: If the value is of a type that does not cross, or out of bounds.
    """
    try:
        # Raw UTF-8 with "surrogatepass": \\u escapes would join two lone surrogates into one character.
        data = _text(value, MAX_DEPTH, [MAX_ITEMS], exact).encode("utf-8", "surrogatepass")
    except RecursionError:
        raise CannotCross("a value is nested too deeply to cross") from None
    return _bounded(data)


def _bounded(data):
    if len(data) > MAX_BYTES:
        raise CannotCross(f"a value of {len(data) >> 20} MB cannot cross: {MAX_BYTES >> 20} MB is the limit")
    return data


def _text(value, depth, counter, exact):
    kind = type(value)
    if kind is int:
        return str(value) if -SMALL_INT < value < SMALL_INT else f'{{"int":"{value:x}"}}'
    if kind is str or kind is bytes:
        if len(value) > MAX_BYTES:
            raise CannotCross(f"a string of {len(value)} characters cannot cross: {MAX_BYTES} are the limit")
        return _dumps(value) if kind is str else f'{{"bytes":"{value.hex()}"}}'
    if kind is bool:
        return "true" if value else "false"
    if kind is float:
        return repr(value) if isfinite(value) else _dumps(value)
    if value is None:
        return "null"
    if kind is complex:
        return f'{{"complex":[{_dumps(value.real)},{_dumps(value.imag)}]}}'
    if kind not in _CONTAINERS:
        name = _NAMES.get(kind)
        if name and not getattr(value, "fold", 0):
            content = _text(_PARTS[name](value), depth, counter, exact)
            return f'{{"{name}":{content}}}'
        return _text(_equal_builtin(value, kind, exact), depth, counter, exact)
    counter[0] -= len(value)
    if counter[0] < 0:
        raise CannotCross(f"a value of more than {MAX_ITEMS} items cannot cross")
    if depth == 0:
        raise CannotCross(f"a value nested more than {MAX_DEPTH} levels deep cannot cross")
    depth -= 1
    if kind is dict:
        pairs = [
            f"[{_text(key, depth, counter, exact)},{_text(item, depth, counter, exact)}]" for key, item in value.items()
        ]
        return f'{{"dict":[{",".join(pairs)}]}}'
    items = ",".join([_text(item, depth, counter, exact) for item in value])
    return f"[{items}]" if kind is list else f'{{"{kind.__name__}":[{items}]}}'


def _equal_builtin(value, kind, exact):
    """Return the builtin value that stands in for one of a well-known type; raise `CannotCross` for other types."""
    if exact:
        raise _foreign(kind)
    if kind in (collections.Counter, collections.OrderedDict, collections.defaultdict):
        return dict(value)
    if tuple in kind.__bases__ and type(getattr(kind, "_fields", None)) is tuple:
        return tuple(tuple.__iter__(value))
    numpy = sys.modules.get("numpy")
    if numpy and kind is numpy.ndarray:
        return value.tolist()
    if numpy and kind.__module__ == "numpy" and isinstance(value, numpy.generic) and type(value.item()) is not kind:
        return value.item()
    raise _foreign(kind)


def _foreign(kind):
    if kind is types.GeneratorType:
        return CannotCross("a generator cannot cross: make it a list")
    return CannotCross(f"a value of type {_name(kind)} cannot cross: only plain values do")


def _name(kind):
    # A class of the solution may carry any object as its name.
    name = type.__dict__["__name__"].__get__(kind)
    return f"{name:.60}" if type(name) is str else "unknown"


_CONTAINERS = frozenset((list, tuple, dict, set, frozenset))
_SCALARS = frozenset((type(None), bool, int, float, complex, str, bytes))


def check(value: Any) -> None:
    """Raise `CannotCross` unless `value` consists of exactly builtin types throughout."""
    kind = type(value)
    if kind is dict:
        if not value:
            return
        value, kind = [*value, *value.values()], list
    if kind in _CONTAINERS:
        if not _SCALARS.issuperset(map(type, value)):
            for item in value:
                check(item)
    elif kind not in _SCALARS:
        raise _foreign(kind)


def decode(data: bytes) -> Any:
    """Return the value in `data`; raise `ValueError` for bytes that `encode` would not have written."""
    opened = 0
    if len(data) > MAX_DEPTH:  # shorter data is within all bounds
        # Separators inside strings count too, which keeps this a single fast scan
        opened = data.count(b"[") + data.count(b"{")
        if opened + data.count(b",") > 3 * MAX_ITEMS:
            raise ValueError("too many items")
    try:
        text = data.decode("utf-8", "surrogatepass")
        value, end = _scan(text)
    except (ValueError, TypeError, RecursionError, ArithmeticError) as error:
        raise ValueError(f"not a frame: {type(error).__name__}") from None
    if end != len(text):
        raise ValueError("not a frame: bytes follow its value")
    if opened > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise ValueError("nested too deeply")
    return value


def _unpack(pairs):
    ((tag, content),) = pairs
    return _TAGS[tag](content) if tag in _TAGS else _refuse(tag)


def _short_int(text):
    # A longer one travels in hexadecimal, as decimal digits take quadratic time
    return int(text) if len(text) <= 20 else _refuse(text)


# json.loads would make a decoder for each value
_scan = json.JSONDecoder(object_pairs_hook=_unpack, parse_int=_short_int).raw_decode


def _refuse(tag):
    raise ValueError("unknown tag")


def _sequence(kind):
    return lambda content: kind(content) if type(content) is list else _refuse(kind)


def _from_text(function):
    return lambda content: function(content) if type(content) is str else _refuse(function)


def _from_ints(function, count):
    def build(content):
        if type(content) is not list or [*map(type, content)] != [int] * count:
            _refuse(function)
        return function(*content)

    return build


def _complex(content):
    real, imag = content
    return complex(real, imag) if type(real) is type(imag) is float else _refuse(complex)


def _timed(value):
    """Return the ISO text of a time or datetime; refuse time zones that the text does not determine."""
    if value.tzinfo is not None and type(value.tzinfo) is not datetime.timezone:
        raise _foreign(type(value.tzinfo))
    return value.isoformat()


_TAGS: dict[str, Callable] = {
    "int": _from_text(lambda text: int(text, 16)),
    "bytes": _from_text(bytes.fromhex),
    "complex": _complex,
    "tuple": _sequence(tuple),
    "set": _sequence(set),
    "frozenset": _sequence(frozenset),
    "dict": _sequence(dict),
    "range": _from_ints(range, 3),
    "decimal": _from_text(Decimal),
    "fraction": _from_ints(Fraction, 2),
    "date": _from_text(datetime.date.fromisoformat),
    "time": _from_text(datetime.time.fromisoformat),
    "datetime": _from_text(datetime.datetime.fromisoformat),
    "timedelta": _from_ints(datetime.timedelta, 3),
}
_NAMES = {
    range: "range",
    Decimal: "decimal",
    Fraction: "fraction",
    datetime.date: "date",
    datetime.time: "time",
    datetime.datetime: "datetime",
    datetime.timedelta: "timedelta",
}
_PARTS: dict[str, Callable] = {
    "range": lambda value: [value.start, value.stop, value.step],
    "decimal": str,
    "fraction": lambda value: [value.numerator, value.denominator],
    "date": datetime.date.isoformat,
    "time": _timed,
    "datetime": _timed,
    "timedelta": lambda value: [value.days, value.seconds, value.microseconds],
}


def _deeper_than(value, limit):
    level = [value]
    for _ in range(limit + 1):
        inner = []
        for item in level:
            if type(item) is dict:
                inner.extend(item)
                inner.extend(item.values())
            elif type(item) in _CONTAINERS:
                inner.extend(item)
        level = [item for item in inner if type(item) in _CONTAINERS]
        if not level:
            return False
    return True


class Channel:
    """Frames over a connected stream socket or two pipes: four bytes of length, then the payload.

    It uses only read and write, because a solution process may make no socket calls.

    Args:
        readable (`int`): The descriptor to read frames from.
        writable (`int`, *optional*): The descriptor to write frames to. Defaults to `readable`.
    """

    def __init__(self, readable: int, writable: int | None = None):
        self.readable = readable
        self.writable = readable if writable is None else writable
        self._pending = b""

    def send(self, value: Any) -> None:
        """Send a plain value."""
        self.send_bytes(encode(value))

    def send_trusted(self, value: Any) -> None:
        """Send a plain value to a solution, as marshal if it can be: fast, and unsafe only for the reader."""
        try:
            check(value)
            data = marshal.dumps(value)
        except (RecursionError, ValueError):
            raise CannotCross("a value is nested too deeply to cross") from None
        except CannotCross:
            data = encode(value, exact=True)
        self.send_bytes(_bounded(data))

    def receive_trusting(self) -> Any:
        """Return the next value of a sender that is trusted."""
        data = self.receive_bytes()
        return decode(data) if data[:1] in (b"{", b"[") else marshal.loads(data)

    def send_program(self, fields: list) -> None:
        """Send a program's fields, of any size, to the judge, which trusts the caller."""
        self.send_bytes(marshal.dumps(fields))

    def receive_program(self) -> list:
        """Return the fields of the next program."""
        return marshal.loads(self.receive_bytes(limit=1 << 32))

    def send_bytes(self, data: bytes) -> None:
        """Send one frame."""
        data = len(data).to_bytes(4, "little") + data
        written = os.write(self.writable, data)
        while written < len(data):
            written += os.write(self.writable, memoryview(data)[written:])

    def receive(self, limit: int = MAX_BYTES) -> Any:
        """Return the next value; raise `EOFError` when the other end is closed, `ValueError` for a bad frame."""
        return decode(self.receive_bytes(limit))

    def receive_bytes(self, limit: int = MAX_BYTES) -> bytes:
        """Return the payload of the next frame; raise as `receive` does."""
        pending = self._pending
        while len(pending) < 4:
            pending += self._read(65536)
        length = int.from_bytes(pending[:4], "little")
        if length > limit:
            raise ValueError(f"a frame of {length} bytes")
        if len(pending) < 4 + length:
            pieces = [pending]
            missing = 4 + length - len(pending)
            while missing > 0:
                pieces.append(self._read(min(missing, 1 << 20)))
                missing -= len(pieces[-1])
            pending = b"".join(pieces)
        self._pending = pending[4 + length :]
        return pending[4 : 4 + length]

    def _read(self, size):
        try:
            data = os.read(self.readable, size)
        except OSError:  # reset, or silent for longer than the socket's time limit
            data = b""
        if not data:
            raise EOFError("the other end of the channel is closed")
        return data

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in {self.readable, self.writable}:
            os.close(descriptor)
