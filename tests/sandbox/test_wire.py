"""Plain values cross and come back equal; nothing else crosses, and no bytes can crash, hang or convince the judge."""

import collections
import datetime
import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox import Program, Sandbox, wire

ANY_TEXT = st.text(st.characters())  # lone surrogates too
HASHABLE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | ANY_TEXT | st.binary(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=4),
    max_leaves=8,
)
PLAIN = st.recursive(
    HASHABLE | st.integers(-(1 << 3000), 1 << 3000),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.tuples(inner, inner)
        | st.sets(HASHABLE, max_size=4)
        | st.dictionaries(HASHABLE, inner, max_size=4)
    ),
    max_leaves=20,
)
GARBAGE = st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["int", "bytes", "complex", "tuple", "set", "frozenset", "dict", "?"]), inner)
    ),
    max_leaves=10,
).map(lambda value: wire._dumps(value).encode())


def exact(value):
    """Returns what tells values apart: the types throughout, the signs of zeros, and that NaN equals itself."""
    kind = type(value)
    if kind in (list, tuple):
        return kind, [exact(item) for item in value]
    if kind in (set, frozenset):
        return kind, sorted((exact(item) for item in value), key=repr)
    if kind is dict:
        return kind, [(exact(key), exact(item)) for key, item in value.items()]
    if kind is float:
        return kind, "nan" if math.isnan(value) else value.hex()
    if kind is complex:
        return kind, exact(value.real), exact(value.imag)
    return kind, value


@given(PLAIN)
@settings(max_examples=300, deadline=None)
def test_a_plain_value_comes_back_equal(value):
    assert exact(wire.decode(wire.encode(value))) == exact(value)


@given(GARBAGE)
@settings(max_examples=500, deadline=None)
def test_garbage_is_a_plain_value_or_refused(data):
    try:
        value = wire.decode(data)
    except ValueError:
        return
    assert exact(wire.decode(wire.encode(value))) == exact(value)


UTC = datetime.UTC
MORE_PLAIN = [
    range(3, 9, 2),
    Decimal("1.50"),
    Decimal("-Infinity"),
    Fraction(-1, 3),
    Fraction(1 << 100, 3),
    datetime.date(2024, 2, 29),
    datetime.time(1, 2, 3, 4),
    datetime.datetime(2024, 2, 29, 1, 2, 3, 4),
    datetime.datetime(2024, 2, 29, tzinfo=UTC),
    datetime.timedelta(-1, 2, 3),
]
Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize("value", MORE_PLAIN, ids=repr)
def test_ranges_numbers_and_dates_cross_as_they_are_both_ways(sandbox, value):
    for each in (value, [value], {value: (value,)}):
        assert exact(wire.decode(wire.encode(each))) == exact(wire.decode(wire.encode(each, exact=True))) == exact(each)
    setup = "import datetime\nfrom decimal import Decimal\nfrom fractions import Fraction"
    tests = f"x = {value!r}\ngot = f([x])\nassert got == [x] and type(got[0]) is type(x) and repr(got) == repr([x])"
    (verdict,) = sandbox.run([Program("f = lambda x: x", tests, "f", setup)])
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    "data",
    [
        b'{"decimal":"x"}', b'{"decimal":1}', b'{"fraction":[1,0]}', b'{"fraction":["1",2]}', b'{"range":[1,2]}',
        b'{"range":[0,1,0]}', b'{"range":[true,1,1]}', b'{"date":"2024-13-01"}', b'{"date":["2024-01-01"]}',
        b'{"timedelta":[1e9,0,0]}', b'{"timedelta":[9999999999,0,0]}', b"1" * 21, b"-" + b"9" * 10_000_000,
    ],
    ids=lambda data: data.decode()[:30],
)  # fmt: skip
def test_bad_numbers_and_dates_are_refused(data):
    with pytest.raises(ValueError):
        wire.decode(data)


def test_what_arrives_as_another_type_crosses_in_a_result_alone(sandbox):
    assert exact(wire.decode(wire.encode([Point(1, 2)]))) == exact([(1, 2)])
    for value in (Point(1, 2), collections.Counter("a")):
        with pytest.raises(wire.CannotCross):
            wire.encode(value, exact=True)
    generator = Program("def f(x):\n    yield x", "f(3)", "f")
    (verdict,) = sandbox.run([generator])
    assert (verdict.status, verdict.detail) == ("error", "in the result: a generator cannot cross: make it a list")


RETURNED_TYPES = """
import array, collections, dataclasses, datetime, enum, typing
from decimal import Decimal
from fractions import Fraction
import numpy
Point = collections.namedtuple("Point", "x y")
class Named(typing.NamedTuple): x: int
class Level(enum.IntEnum): LOW = 1
@dataclasses.dataclass
class Data: x: int
"""
CANNOT = "in the result: a value of type {} cannot cross: only plain values do"

RETURNED = {  # what a solution returns, and what arrives or the program's detail
    "numpy.array([[1, 2], [3, 4]])": [[1, 2], [3, 4]],
    "numpy.array([1.5, -0.0])": [1.5, -0.0],
    "numpy.array(5)": 5,
    "numpy.array(['a', ''])": ["a", ""],
    "numpy.array([True])": [True],
    "numpy.array([1j])": [1j],
    "numpy.array(['2024-02-29'], dtype='datetime64[D]')": [datetime.date(2024, 2, 29)],
    "numpy.array([(1, 2.5)], dtype=[('a', int), ('b', float)])": [(1, 2.5)],
    "numpy.array([{1}, None], dtype=object)": [{1}, None],
    "(numpy.int64(3), {numpy.str_('a'): [numpy.bool_(True)]})": (3, {"a": [True]}),
    "numpy.float32(0.5)": 0.5,
    "Point(1, [Point(2, 3)])": (1, [(2, 3)]),
    "Named(1)": (1,),
    "Decimal('1.50')": Decimal("1.50"),
    "Fraction(2, 4)": Fraction(1, 2),
    "datetime.date(2024, 2, 29)": datetime.date(2024, 2, 29),
    "datetime.datetime(2024, 2, 29, 1, 2, 3, 4, datetime.UTC)": datetime.datetime(2024, 2, 29, 1, 2, 3, 4, UTC),
    "datetime.timedelta(1.5)": datetime.timedelta(1.5),
    "range(3, 9, 2)": range(3, 9, 2),
    "collections.Counter('aab')": {"a": 2, "b": 1},
    "(i for i in [1])": "in the result: a generator cannot cross: make it a list",
    "map(abs, [1])": CANNOT.format("map"),
    "iter([1])": CANNOT.format("list_iterator"),
    "{1: 2}.items()": CANNOT.format("dict_items"),
    "collections.deque([1])": CANNOT.format("deque"),
    "array.array('i', [1])": CANNOT.format("array"),
    "numpy.array([object()])": CANNOT.format("object"),
    "numpy.ma.array([1, 2], mask=[0, 1])": CANNOT.format("MaskedArray"),
    "numpy.matrix([[1]])": CANNOT.format("matrix"),
    "numpy.longdouble(1.5)": CANNOT.format("longdouble"),
    "Level.LOW": CANNOT.format("Level"),
    "Data(1)": CANNOT.format("Data"),
    "datetime.time(1, fold=1)": CANNOT.format("time"),
}


@pytest.mark.parametrize("returned, arrives", RETURNED.items(), ids=RETURNED)
def test_what_a_solution_may_return(sandbox, returned, arrives):
    """A result arrives as the documented plain value, or its program fails and names the type."""
    if "numpy" in returned:
        pytest.importorskip("numpy")
    solution = f"{RETURNED_TYPES}def f():\n    return {returned}\n"
    tests = f"assert repr(f()) == {repr(arrives)!r}"
    (verdict,) = sandbox.run([Program(solution, tests, "f")])
    fails = type(arrives) is str
    assert (verdict.status, verdict.detail) == (("error", arrives) if fails else ("passed", "")), verdict


class Child(int):
    pass


NOT_PLAIN = [object(), Child(1), [Child(1)], {Child(1): 1}, {1: {2: (Child(3),)}}, len, int, bytearray(b"x")]


@pytest.mark.parametrize(
    "value",
    [*NOT_PLAIN, ..., ValueError(), (i for i in []), memoryview(b"x"), {}.keys()],
    ids=lambda value: type(value).__name__,
)
def test_nothing_else_crosses(value):
    with pytest.raises(wire.CannotCross):
        wire.encode(value)
    with pytest.raises(wire.CannotCross):
        wire.check(value)


@pytest.mark.parametrize(
    "value, crossed",
    [
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.defaultdict(list, a=[1]), {"a": [1]}),
    ],
)
def test_a_dictionary_of_the_standard_library_crosses_as_a_dict(value, crossed):
    assert exact(wire.decode(wire.encode(value))) == exact(crossed)


def test_numpy_scalars_cross_as_python_numbers():
    numpy = pytest.importorskip("numpy")
    values = [numpy.float64(1.5), numpy.int64(-3), numpy.bool_(True), numpy.float32(0.5)]
    assert exact(wire.decode(wire.encode(values))) == exact([1.5, -3, True, 0.5])
    assert exact(wire.decode(wire.encode(numpy.array([[1, 2], [3, 4]])))) == exact([[1, 2], [3, 4]])
    with pytest.raises(wire.CannotCross):
        wire.encode(numpy.array([object()]))


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


def test_bounds_hold_on_both_sides():
    assert wire.decode(wire.encode(nested(wire.MAX_DEPTH))) == nested(wire.MAX_DEPTH)
    for value in (nested(wire.MAX_DEPTH + 1), [0] * (wire.MAX_ITEMS + 1), "x" * (wire.MAX_BYTES + 1)):
        with pytest.raises(wire.CannotCross):
            wire.encode(value)
    for data in (b"[" * 150 + b"]" * 150, b"[" * 10**6, b"[" + b"0," * (3 * wire.MAX_ITEMS) + b"0]"):
        with pytest.raises(ValueError):
            wire.decode(data)


@given(st.lists(GARBAGE | st.binary(max_size=40), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_garbage_on_the_channel_never_convinces(sandbox, pieces):
    """The solution writes anything, with and without a frame around it, where answers are expected."""
    framed = [len(piece).to_bytes(4, "little") + piece for piece in pieces]
    source = "import os\ndef f(x):\n    for piece in {}: os.write(3, piece)\n    os._exit(0)\n"
    tests = "try:\n    got = f(3)\nexcept Exception:\n    got = None\nassert got == 918273645"
    programs = [Program(source.format(each), tests, "f") for each in (pieces, framed)]
    verdicts = sandbox.run([*programs, Program("f = lambda x: x", "assert f(3) == 3", "f")])
    assert [verdict.passed for verdict in verdicts] == [False, False, True]


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout=1.0) as sandbox:
        yield sandbox
