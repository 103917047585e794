"""How plain builtin values cross between the judge and a solution: what is plain, and in which bytes.

What a solution writes is length-framed JSON. Lists, strings, numbers, booleans and None are themselves; every other
type is an object with one key that names the type. The decoder knows these few names and nothing else, so hostile
bytes become a plain value or a `ValueError`, never code. Size, depth and number of items are bounded. What the judge
writes to a solution is marshal, checked to be as plain; the caller's programs travel to the judge as marshal too, of
any size.

Not covered here: what the messages mean (judge.py, solution.py).
"""

import collections
import json
import marshal
import os
import sys
from math import isfinite

MAX_BYTES = 16 << 20  # one frame
MAX_ITEMS = 2_000_000  # values in one frame, containers included
MAX_DEPTH = 100  # containers within containers
SMALL_INT = 1 << 63  # larger integers travel in hexadecimal, which converts in linear time

_dumps = json.JSONEncoder(ensure_ascii=False).encode  # of strings and numbers: `_text` writes what contains them


class CannotCross(Exception):
    """A value that is not plain data, or is too large to send."""


def encode(value):
    """Returns `value` as bytes; raises `CannotCross` for anything but bounded, exactly typed builtin values."""
    try:
        # Raw UTF-8 with "surrogatepass": \\u escapes would join two lone surrogates into one character.
        data = _text(value, MAX_DEPTH, [MAX_ITEMS]).encode("utf-8", "surrogatepass")
    except RecursionError:
        raise CannotCross("a value is nested too deep to cross") from None
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
        raise CannotCross(f"a value nested more than {MAX_DEPTH} deep cannot cross")
    depth -= 1
    if kind is dict:
        pairs = [f"[{_text(key, depth, counter)},{_text(item, depth, counter)}]" for key, item in value.items()]
        return f'{{"dict":[{",".join(pairs)}]}}'
    items = ",".join([_text(item, depth, counter) for item in value])
    return f"[{items}]" if kind is list else f'{{"{kind.__name__}":[{items}]}}'


def _equal_builtin(value, kind):
    """Returns the builtin value that a well-known type equals, which then crosses in its place."""
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


def check(value):
    """Raises `CannotCross` unless `value` is of exactly typed builtin values throughout."""
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


def decode(data):
    """Returns the value in `data`; raises `ValueError` for bytes that `encode` would not have written."""
    opened = 0
    if len(data) > MAX_DEPTH:  # what is shorter is within all bounds
        # Separators inside strings are counted too: the bound stays one, and counting stays at memory speed.
        opened = data.count(b"[") + data.count(b"{")
        if opened + data.count(b",") > 3 * MAX_ITEMS:
            raise ValueError("too many items")
    try:
        text = data.decode("utf-8", "surrogatepass")
        value, end = _scan(text)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"not a frame: {type(error).__name__}") from None
    if end != len(text):
        raise ValueError("not a frame: there is more after its value")
    if opened > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise ValueError("nested too deep")
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
    """Frames over a connected stream socket, or over two pipes: four bytes of length, then the payload.

    Only read and write are used, so that a process which may make no socket call can still use it.

    Args:
        readable (`int`): The descriptor that frames come from.
        writable (`int`, *optional*): The one that frames go to, if it is another.
    """

    def __init__(self, readable, writable=None):
        self.readable = readable
        self.writable = readable if writable is None else writable
        self._pending = b""

    def send(self, value):
        self.send_bytes(encode(value))

    def send_trusted(self, value):
        """Sends a plain value to a solution: in marshal, which is fast, and unsafe only for the side that reads."""
        try:
            check(value)
            data = marshal.dumps(value)
        except (RecursionError, ValueError):
            raise CannotCross("a value is nested too deep to cross") from None
        self.send_bytes(_bounded(data))

    def receive_trusting(self):
        return marshal.loads(self.receive_bytes())

    def send_program(self, texts):
        """Sends the caller's texts, of any size, to the judge, which trusts the caller."""
        self.send_bytes(marshal.dumps(texts))

    def receive_program(self):
        return marshal.loads(self.receive_bytes(limit=1 << 32))

    def send_bytes(self, data):
        data = len(data).to_bytes(4, "little") + data
        written = os.write(self.writable, data)
        while written < len(data):
            written += os.write(self.writable, memoryview(data)[written:])

    def receive(self, limit=MAX_BYTES):
        """Returns the next value; raises `EOFError` when the other side is gone, `ValueError` for a bad frame."""
        return decode(self.receive_bytes(limit))

    def receive_bytes(self, limit=MAX_BYTES):
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
            raise EOFError("the other side closed the channel")
        return data

    def close(self):
        for descriptor in {self.readable, self.writable}:
            os.close(descriptor)
