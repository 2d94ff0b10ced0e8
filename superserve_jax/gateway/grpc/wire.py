"""Counts the fields of a message in the format of protobuf before it is parsed. No protobuf, no sockets.

A parsed field takes up to 85 bytes of memory, but its client sends 2. Without a limit, a message of 64 MiB would take 2.7 GB.
"""

from superserve_jax.gateway.failures import RequestError

MOST_FIELDS = 20_000
_SMALL = 1 << 18
"""Bytes of a message whose fields need not be counted."""
_INPUTS, _CONTENTS = 5, 5  # numbers of fields: `inputs` of a request, and `contents` of an input
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def check_fields(data: bytes) -> None:
    """Raises RequestError if a long ModelInferRequest has more than `MOST_FIELDS` fields, with those of its inputs.

    >>> check_fields(b"\\x2a\\x00" * 500_000)
    Traceback (most recent call last):
    superserve_jax.gateway.failures.RequestError: the message has more than 20,000 fields; send the data in raw_input_contents
    """
    if len(data) > _SMALL and _count(data, 0, len(data), (_INPUTS, _CONTENTS), 0) > MOST_FIELDS:
        raise RequestError(f"the message has more than {MOST_FIELDS:,} fields; send the data in raw_input_contents")


def _count(data: bytes, at: int, end: int, inside: tuple[int, ...], count: int) -> int:
    """`count` and the number of fields in a part. It stops above `MOST_FIELDS`, and where the data is malformed.

    Args:
      data: the message.
      at, end: the bounds of the part.
      inside: the number of the field whose own fields count, too; then the one in there, and so on.
      count: the fields before the part.
    """
    while at < end and count <= MOST_FIELDS:
        tag, at = _varint(data, at)
        count += 1
        kind = tag & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _LENGTH:
            length, at = _varint(data, at)
            if inside and tag >> 3 == inside[0] and at + length <= end:
                count = _count(data, at, at + length, inside[1:], count)
            at += length
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            break  # groups, which no message of the protocol has
    return count


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
        if shift > 63:
            return value, len(data)
    return value, at
