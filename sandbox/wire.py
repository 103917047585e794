"""The wire format: which values cross between the judge and a solution, and in which bytes.

A solution writes length-framed JSON. Lists, strings, numbers, booleans and None are themselves; every other type is an
object with one key, which names the type. The decoder knows these few names and nothing else, so hostile bytes become a
plain value or a `ValueError`, never code. Size, depth and number of items are bounded. The judge writes marshal to a
solution, after checking that the value is as plain. The caller sends programs to the judge as marshal too, of any size.

Not covered here: what the messages mean (judge.py, solution.py).
"""

import collections
import json
import marshal
import os
import sys
from math import isfinite
from typing import Any

MAX_BYTES = 16 << 20  # one frame
MAX_ITEMS = 2_000_000  # values in one frame, containers included
MAX_DEPTH = 100  # containers within containers
SMALL_INT = 1 << 63  # larger integers travel in hexadecimal, which converts in linear time

_dumps = json.JSONEncoder(ensure_ascii=False).encode  # of strings and numbers: `_text` writes what contains them


class CannotCross(Exception):
    """Raised for a value that is not plain data or is too large to send."""


def encode(value: Any) -> bytes:
    """Return `value` as bytes; raise `CannotCross` for anything but bounded values of exactly builtin types."""
    try:
        # Raw UTF-8 with "surrogatepass": \\u escapes would join two lone surrogates into one character.
        data = _text(value, MAX_DEPTH, [MAX_ITEMS]).encode("utf-8", "surrogatepass")
    except RecursionError:
        raise CannotCross("a value is nested too deeply to cross") from None
    return _bounded(data)


def _bounded(data):
    if len(data) > MAX_BYTES:
        raise CannotCross(f"a value of {len(data) >> 20} MB cannot cross: {MAX_BYTES >> 20} MB is the limit")
    return data


def _text(value, depth, counter):
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
        return _text(_equal_builtin(value, kind), depth, counter)
    counter[0] -= len(value)
    if counter[0] < 0:
        raise CannotCross(f"a value of more than {MAX_ITEMS} items cannot cross")
    if depth == 0:
        raise CannotCross(f"a value nested more than {MAX_DEPTH} levels deep cannot cross")
    depth -= 1
    if kind is dict:
        pairs = [f"[{_text(key, depth, counter)},{_text(item, depth, counter)}]" for key, item in value.items()]
        return f'{{"dict":[{",".join(pairs)}]}}'
    items = ",".join([_text(item, depth, counter) for item in value])
    return f"[{items}]" if kind is list else f'{{"{kind.__name__}":[{items}]}}'


def _equal_builtin(value, kind):
    """Return the builtin value that stands in for one of a well-known type; raise `CannotCross` for other types."""
    if kind in (collections.Counter, collections.OrderedDict, collections.defaultdict):
        return dict(value)
    numpy = sys.modules.get("numpy")
    if numpy and kind.__module__ == "numpy" and isinstance(value, numpy.generic) and type(value.item()) is not kind:
        return value.item()
    raise _foreign(kind)


def _foreign(kind):
    return CannotCross(f"a value of type {_name(kind)} cannot cross: only plain builtin values do")


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
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"not a frame: {type(error).__name__}") from None
    if end != len(text):
        raise ValueError("not a frame: bytes follow its value")
    if opened > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise ValueError("nested too deeply")
    return value


def _unpack(pairs):
    ((tag, content),) = pairs
    return _TAGS[tag](content) if tag in _TAGS else _refuse(tag)


_scan = json.JSONDecoder(object_pairs_hook=_unpack).raw_decode  # json.loads would make a decoder for each value


def _refuse(tag):
    raise ValueError("unknown tag")


def _sequence(kind):
    return lambda content: kind(content) if type(content) is list else _refuse(kind)


def _number(content):
    return int(content, 16) if type(content) is str else _refuse(int)


def _complex(content):
    real, imag = content
    return complex(real, imag) if type(real) is type(imag) is float else _refuse(complex)


_TAGS = {
    "int": _number,
    "bytes": bytes.fromhex,
    "complex": _complex,
    "tuple": _sequence(tuple),
    "set": _sequence(set),
    "frozenset": _sequence(frozenset),
    "dict": _sequence(dict),
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
        """Send a plain value to a solution, as marshal: fast, and unsafe only for the process that reads it."""
        try:
            check(value)
            data = marshal.dumps(value)
        except (RecursionError, ValueError):
            raise CannotCross("a value is nested too deeply to cross") from None
        self.send_bytes(_bounded(data))

    def receive_trusting(self) -> Any:
        """Return the next value of a sender that is trusted."""
        return marshal.loads(self.receive_bytes())

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
