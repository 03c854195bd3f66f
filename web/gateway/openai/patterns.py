"""Regular expressions as clients write them, in the way in which the library reads them (pure).

Its own are Rust's. Schemas have those of ECMAScript, and generators write Python's. What can be said in Rust's words
is; what the library cannot follow is refused by name.
"""

from __future__ import annotations

import re

from controlplane.grammar import GrammarError

_OUTSIDE = re.compile(r"\\c[A-Za-z]|\\.|\[\^?\]?|\(\?<?[=!]|\{,[0-9]+\}|.", re.DOTALL)
_WITHIN_CLASS = re.compile(r"\\c[A-Za-z]|\\.|\[:\^?[a-z]+:\]|&&|--|~~|.", re.DOTALL)
_REFUSED = {
    **{rf"\{letter}": "word boundaries" for letter in "bB"},
    **{rf"\{digit}": "backreferences" for digit in "123456789k"},
    **{f"(?{sign}": "look-ahead" for sign in "=!"},
    **{f"(?<{sign}": "look-behind" for sign in "=!"},
}


def readable_pattern(pattern: str, keyword: str, schema: bool) -> str:
    """`keyword`: what gives it, for the error; `schema`: it is ECMAScript's, whose classes have no sets within them.

    Raises GrammarError.
    """
    parts, at, within_class = list[str](), 0, False
    while at < len(pattern):
        found = (_WITHIN_CLASS if within_class else _OUTSIDE).match(pattern, at)
        assert found is not None
        piece, at = found[0], found.end()
        if len(piece) == 3 and piece.startswith("\\c"):
            piece = f"\\x{ord(piece[2]) % 32:02x}"
        elif within_class:
            within_class = piece != "]"
            piece = _in_class(piece, schema)
        elif schema and piece == "[^]":
            piece = r"[\s\S]"
        elif schema and piece == "[]":
            raise GrammarError(f"{keyword} {pattern[:80]!r}: an empty class ([]) matches nothing")
        elif piece in _REFUSED:
            raise GrammarError(f"{keyword} {pattern[:80]!r}: {_REFUSED[piece]} ({piece}) cannot be followed")
        else:
            within_class = piece[0] == "["
            piece = _outside(piece, schema)
        parts.append(piece)
    return "".join(parts)


def _outside(piece: str, schema: bool) -> str:
    if piece == "\\Z":
        return "\\z"  # Python's end of the text
    if piece.startswith("{,"):
        return "{0" + piece[1:]
    return piece[1] if schema and piece in ("\\<", "\\>") else piece


def _in_class(piece: str, schema: bool) -> str:
    if piece == "\\b":
        return "\\x08"
    if schema and piece in ("[", "&&", "--", "~~"):  # Rust's, for a class within and for sets
        return piece[:-1] + "\\" + piece[-1]
    return piece
