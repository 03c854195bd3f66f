"""Halves of characters that JSON and Python's literals can write, and UTF-8 cannot (pure)."""

from __future__ import annotations


def paired(text: str) -> str:
    """Two halves of a surrogate pair are one character; one alone, as of a text that was cut within an emoji, is none,
    and becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
