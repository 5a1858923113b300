"""Plain data over a pipe: how arguments and results cross the border of the sandbox.

A result is rebuilt on the trusted side from its content alone, so an object that overrides `__eq__`, `__class__` or
`__reduce__` arrives as what it holds, or not at all; nothing is ever unpickled. One value is one line of ASCII JSON:
text, true, false and null as they are, and everything else as [tag, content].
"""

import json

LONGEST = 4_000_000  # characters of one message; a larger one is refused unread
DEEPEST = 100  # levels of nesting


class NotPlain(Exception):
    """A value that is not made of plain data, or a message that is not of this form."""


_CONTAINERS = ((list, "l", list.__iter__), (tuple, "t", tuple.__iter__), (set, "s", set.__iter__))


def pack(value, depth=0):
    """What `json.dumps` takes. Subclasses of built-in types are read through the base's own methods."""
    if value is None or value is True or value is False:
        return value
    if depth > DEEPEST:
        raise NotPlain(f"nested more than {DEEPEST} deep")
    kind = type(value)
    if issubclass(kind, str):
        return str.__str__(value)
    if issubclass(kind, int):
        return ["i", int.__format__(value, "x")]
    if issubclass(kind, float):
        return ["f", float.__repr__(value)]
    if issubclass(kind, complex):
        return ["c", float.__repr__(value.real), float.__repr__(value.imag)]
    if issubclass(kind, (bytes, bytearray)):
        return ["b", bytes(value).hex()]
    for base, tag, iterate in _CONTAINERS:
        if issubclass(kind, base):
            return [tag, [pack(item, depth + 1) for item in iterate(value)]]
    if issubclass(kind, frozenset):
        return ["z", [pack(item, depth + 1) for item in frozenset.__iter__(value)]]
    if issubclass(kind, dict):
        return ["d", [[pack(k, depth + 1), pack(v, depth + 1)] for k, v in dict.items(value)]]
    if kind.__module__ == "fractions" and kind.__name__ == "Fraction":
        return ["q", pack(value.numerator), pack(value.denominator)]
    if kind.__module__ == "decimal" and kind.__name__ == "Decimal":
        return ["m", str(value)]
    raise NotPlain(f"a value of type {kind.__name__} is not plain data")


def unpack(packed):
    """The value of what `pack` made; NotPlain for anything else."""
    if packed is None or isinstance(packed, (bool, str)):
        return packed
    try:
        tag, *content = packed
        if tag == "i":
            return int(content[0], 16)
        if tag == "f":
            return float(content[0])
        if tag == "c":
            return complex(float(content[0]), float(content[1]))
        if tag == "b":
            return bytes.fromhex(content[0])
        if tag in ("l", "t", "s", "z"):
            build = {"l": list, "t": tuple, "s": set, "z": frozenset}[tag]
            return build([unpack(item) for item in content[0]])
        if tag == "d":
            return {unpack(k): unpack(v) for k, v in content[0]}
        if tag == "q":
            from fractions import Fraction

            return Fraction(unpack(content[0]), unpack(content[1]))
        if tag == "m":
            from decimal import Decimal

            return Decimal(content[0])
    except (TypeError, ValueError, IndexError, ArithmeticError, RecursionError) as error:
        raise NotPlain(f"a malformed message: {error}") from None
    raise NotPlain("a malformed message")


def dump(message):
    """A JSON object of packed parts as one line of bytes."""
    line = json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n"
    if len(line) > LONGEST:
        raise NotPlain(f"a message of {len(line)} characters")
    return line


def load(line):
    """The object of one line; NotPlain where it is none."""
    if len(line) > LONGEST:
        raise NotPlain(f"a message of {len(line)} characters")
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise NotPlain(f"a malformed message: {error}") from None
    if not isinstance(message, dict):
        raise NotPlain("a malformed message")
    return message
