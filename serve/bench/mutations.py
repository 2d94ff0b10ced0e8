"""Damages the content of files: any bytes, JSON, CSV and NumPy archives. The same `random.Random` gives the same damage.

Each function returns content that is wrong in one to four ways. By chance, some of it is valid.
"""

import ast
import contextlib
import copy
import io
import json
import random
import struct
import warnings
import zipfile
from typing import Any

_CHANGES = (1, 1, 1, 2, 3, 4)  # how many changes one file gets

_HUGE = (1 << 31, 1 << 63, 1 << 70, 10**12, 10**400, -1, -(1 << 63), -(10**400))
_FLOATS = (0.5, -0.5, 1e-320, -0.0, 1e12, 1e300, 1e308, float("nan"), float("inf"), -float("inf"))
_TEXTS = ("", "x", "1", "nan", "../../etc/passwd", "/", ".", "\0", "\ud800", "a\nb", "é", "\u202e", "x" * 10_000, "9" * 5_000)
_LISTS = ([], [[]], [None], [0], [1, 2, 3], ["x"], [1e400], {}, {"family": "single_subnet"}, {"gates": [1]}, [[0]] * 2_000)
_VALUES = (None, True, False, 0, 1, 2, 7, 1_000, 1 << 20, *_HUGE, *_FLOATS, *_TEXTS, *_LISTS)
_MOST_PLACES = 3_000  # a larger value is not changed further, or parts that are repeated 50 times would fill the memory
_DEEP = (10, 100, 400, 900, 5_000, 100_000)

_CELLS = (
    *("", "0", "1", "2.5", "-1", "nan", "inf", "-inf", "1e308", "1e400", "-1e-400", "9" * 400, "9007199254740993", "x"),
    *("0x10", "1_0", "٣", " 7 ", "\0", '"', '""', "'", "é", "\ufeff", "\ud800", "a\nb", "\r", ",", ";", "x" * 140_000),
)
_HEADERS = (
    *("arrival_s", "slo_ms", "floor", "length", "arrival_s ", "ARRIVAL_S", "1", "2", "1440", "minute 7", "d2_1", "1.1", "1_y"),
    *("HashOwner", "-1", "0", "1.0", "٣", "9" * 9, "9" * 5_000, "None"),
)

_DTYPES = (
    *("<f4", "<f8", ">f4", "<f2", "<c8", "<i8", "<u8", "|b1", "|i1", "|O", "|V0", "|S0", "<U0", "|V8", "<U1000000000", "|S9"),
    *("<M8[s]", "<m8", "(1000000,)<f4", "<U2", "x", "", "<f4,<f4", "|V1000000000"),
)
_SHAPES = (
    *("()", "(0,)", "(2, 0)", "(1,)", "(-1, 4)", "(-1,)", "(2.0, 4)", "(True, 4)", "(None,)", "('2', 4)", "4", "[2, 4]"),
    *("(2, 1000000000000)", "(4611686018427387904, 4611686018427387904)", "(1000000000,)", "(9223372036854775808,)"),
    *("(0, 1000000000000)", "(1,) * 40", "(" + "1, " * 100 + ")", "(2, 4, 1)", "(4, 2)"),
)
_MEMBERS = ("subnets", "widths", "rows", "row0", "row1", "x", "../x", "/x", "rows.npy", "", "é", "file", "a" * 300)
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def any_bytes(rng: random.Random, content: bytes) -> bytes:
    """Flips bits, and cuts, inserts, repeats, overwrites, swaps and removes pieces."""
    data = bytearray(content)
    for _ in range(rng.choice(_CHANGES)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 1, 2, 4, 8, 64, 1_000)))
        match rng.randrange(9):
            case 0 | 1 | 2 if start < end:
                data[start] ^= 1 << rng.randrange(8)
            case 3:
                del data[start:]
            case 4:
                data[start:start] = rng.randbytes(rng.choice((1, 2, 8, 100)))
            case 5:
                data[start:start] = data[start:end] * rng.choice((1, 1, 2, 100))
            case 6:
                del data[start:end]
            case 7:
                data[start:end] = rng.choice((b"\0", b"\xff", b"0", b"9", b"-")) * (end - start)
            case _:
                data[start:end], data[:start] = data[:start], data[start:end]
    return bytes(data)


# -- JSON ---------------------------------------------------------------------------------------------------------------------


def json_value(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value in which parts are replaced, removed, doubled, moved or added."""
    whole = [copy.deepcopy(value)]  # in a list, so that the whole value can be replaced, too
    for _ in range(rng.choice(_CHANGES)):
        places = _places(whole)
        if len(places) > _MOST_PLACES:
            break
        inside, key = rng.choice(places[1:] if len(places) > 1 and rng.random() < 0.99 else places)
        match rng.randrange(8):
            case 0 | 1 | 2:
                inside[key] = _other(rng, inside[key])
            case 3:
                other, place = rng.choice(places)
                with contextlib.suppress(RecursionError):  # it is nested too deep
                    inside[key] = copy.deepcopy(other[place])
            case 4:
                inside[key] = [inside[key]] * rng.choice((1, 2, 2, 50))
            case 5 if inside is not whole:
                del inside[key]
            case 6 if isinstance(inside, list):
                inside.insert(key, _other(rng, inside[key]))
            case 6:
                inside[rng.choice((*_TEXTS, f"{key} ", str(key).upper()))] = inside[key]
            case _:
                inside[key] = _nested(rng.choice(_DEEP[:3]), rng.random() < 0.5)
    return whole[0]


def json_text(rng: random.Random, text: str) -> bytes:
    """JSON text with a key twice, a value that is nested too deep, another encoding, or damaged bytes."""
    quotes = [i for i, character in enumerate(text) if character == '"'] or [0]
    place, depth = rng.choice(quotes), rng.choice(_DEEP)
    match rng.randrange(8):
        case 0:
            return (text[:place] + f'"{rng.choice(("files", "served", "rows", "schema"))}": 7, ' + text[place:]).encode()
        case 1:
            return (text[:place] + "[" * depth + "]" * depth + "," + text[place:]).encode()
        case 2:
            return ('{"a":' * depth + text + "}" * depth).encode()
        case 3:
            return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7")))
        case 4:
            return (
                text[:place] + rng.choice(("NaN,", "Infinity,", "9" * 5_000 + ",", "/**/", "'", "\0")) + text[place:]
            ).encode()
        case 5:
            return rng.choice((b"", b"{}", b"[]", b"null", b"1e999", b'"\\ud800"', b"\xff\xfe", b" " * 1_000))
        case _:
            return any_bytes(rng, text.encode())


def _other(rng: random.Random, value: Any) -> Any:
    """Another value: any odd one, or one near `value`."""
    if rng.random() < 0.5:
        return copy.deepcopy(rng.choice(_VALUES))
    match value:
        case bool():
            return int(value)
        case int() | float():
            return rng.choice((-value, value + 1, value - 1, value * 2, str(value), [value]))
        case str():
            return rng.choice((value + "x", value[:-1], value.upper(), value * 2, value[::-1], [value], list(value)[:9]))
        case list():
            return rng.choice((value[:-1], value[::-1], value * 2, dict.fromkeys(map(str, value)), {"0": value}))
        case dict():
            return rng.choice((list(value.items()), list(value), dict(reversed(value.items())), {**value, "x": 1}))
        case _:
            return rng.choice((0, False, "None", []))


def _nested(depth: int, lists: bool) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value] if lists else {"a": value}
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """The container and the key of every part of a JSON value."""
    found, containers = [], [value]
    while containers:
        inside = containers.pop()
        for key, inner in inside.items() if isinstance(inside, dict) else enumerate(inside):
            found.append((inside, key))
            if isinstance(inner, dict | list):
                containers.append(inner)
    return found


# -- CSV ----------------------------------------------------------------------------------------------------------------------


def csv_file(rng: random.Random, content: bytes) -> bytes:
    """Replaces, removes, doubles and adds cells, rows and columns; and changes quotes, line ends and encoding."""
    rows = [line.split(",") for line in content.decode().splitlines()]
    for _ in range(rng.choice(_CHANGES)):
        row = rng.choice(rows)
        cell = rng.randrange(len(row)) if row else 0
        match rng.randrange(10):
            case 0 | 1 | 2 if row:
                row[cell] = rng.choice(_CELLS)
            case 3 if rows[0]:
                rows[0][rng.randrange(len(rows[0]))] = rng.choice(_HEADERS)
            case 4:
                row.insert(cell, rng.choice(_CELLS))
            case 5 if row:
                del row[cell]
            case 6:
                rows.insert(rng.randrange(len(rows)), rng.choice((list(row), [], rows[0], [""] * len(row))))
            case 7 if len(rows) > 1:
                rows.remove(row)
            case 8:
                for each, new in zip(rows, rng.choices(_CELLS, k=len(rows)), strict=True):
                    each.append(new)
            case _:
                row *= rng.choice((2, 100))
    end, quote = rng.choice(("\n", "\n", "\n", "\r\n", "\r", "\n\n", "")), rng.choice(("", "", "", '"', "'"))
    text = end.join(rng.choice((",", ",", ",", ",", ";")).join(f"{quote}{cell}{quote}" for cell in row) for row in rows)
    data = text.encode(rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-7")), "surrogatepass")
    return any_bytes(rng, data) if rng.random() < 0.2 else data


# -- NumPy archives -----------------------------------------------------------------------------------------------------------


def npz_file(rng: random.Random, content: bytes) -> bytes:
    """Changes headers, values and names of the arrays, the way they are packed, or any bytes of the archive."""
    if rng.random() < 0.25:
        return any_bytes(rng, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    for _ in range(rng.choice(_CHANGES)):
        place = rng.randrange(len(members))
        name, member = members[place]
        match rng.randrange(10):
            case 0 | 1 | 2:
                members[place] = name, _other_header(rng, member)
            case 3:
                members[place] = name, any_bytes(rng, member)
            case 4:
                members[place] = name, _other_values(rng, name, member)
            case 5:
                members[place] = f"{rng.choice(_MEMBERS)}.npy", member
            case 6:
                members.insert(place, (rng.choice((name, f"{rng.choice(_MEMBERS)}.npy")), rng.choice(members)[1]))
            case 7 if len(members) > 1:
                del members[place]
            case 8:
                members[place] = name, member + bytes(rng.choice((1, 1_000, 1_000_000)))
            case _:
                members[place] = name, rng.choice((b"", b"\x80\x04.", b"PK", b"\x93NUMPY", member[:40]))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice(_COMPRESSIONS)) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may occur twice
        for name, member in members:
            archive.writestr(name, member)
    data = buffer.getvalue()
    return any_bytes(rng, data) if rng.random() < 0.1 else data


def _other_header(rng: random.Random, member: bytes) -> bytes:
    """An array's file with other claims in its header."""
    header, values = _split(member)
    shape, descr, order = f"{header['shape']!r}", f"{header['descr']!r}", f"{header['fortran_order']}"
    match rng.randrange(5):
        case 0 | 1:
            shape = rng.choice(_SHAPES)
        case 2 | 3:
            descr = repr(rng.choice(_DTYPES))
            shape = rng.choice((shape, shape, *_SHAPES))
        case _:
            order = rng.choice(("True", "None", "7", "'x'"))
            descr = rng.choice((descr, "[('a', '<f4')]", "[('a', '|V0')]", "[]", "None", "('<f4', (1000000,))"))
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    return _packed(rng, rng.choice((text, text, text, text, text[:-3], text + " " * 70_000, "{" * 200, text + "L")), values)


def _other_values(rng: random.Random, name: str, member: bytes) -> bytes:
    """An array's file with other values. The list of subnets becomes other JSON."""
    header, values = _split(member)
    if name != "subnets.npy":
        new = rng.choice((struct.pack("<f", float("nan")), struct.pack("<f", -1.0), b"\xff" * 4, bytes(4), rng.randbytes(4)))
        place = 4 * rng.randrange(max(len(values) // 4, 1))
        values = values[:place] + new + values[place + 4 :]
        return _packed(rng, repr(header), values)
    try:
        changed = json.dumps(json_value(rng, json.loads(values.decode("utf-32-le"))))
    except (TypeError, ValueError):  # damaged before
        changed = "[" * rng.choice(_DEEP)
    return _packed(rng, repr({**header, "descr": f"<U{len(changed)}"}), changed.encode("utf-32-le", "surrogatepass"))


def _split(member: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and values of an array's file; another header if it is damaged."""
    (size,) = struct.unpack_from("<H", member.ljust(10), 8)
    try:
        header = ast.literal_eval(member[10 : 10 + size].decode().strip())
        return {name: header[name] for name in ("descr", "fortran_order", "shape")}, member[10 + size :]
    except (LookupError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
        return {"descr": "<f4", "fortran_order": False, "shape": (1,)}, member


def _packed(rng: random.Random, header: str, values: bytes) -> bytes:
    version = rng.choice((1, 1, 1, 1, 2, 3, 9))
    text = header.encode() + b"\n"
    if version == 1:
        return b"\x93NUMPY\1\0" + struct.pack("<H", min(len(text), 65_535)) + text + values
    claimed = rng.choice((len(text), len(text), 1 << 31, 0))
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<I", claimed) + text + values
