"""Python's literals as JSON (pure). Nothing is evaluated."""

from __future__ import annotations

import json
import re

from web.gateway.text.surrogates import paired

DEPTH_MAX = 64
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_WORD = re.compile(r"[A-Za-z]+")
_NUMBER = re.compile(r"[+-]?(?:(\d[\d_]*)(\.\d*)?|(\.\d+))([eE][+-]?\d+)?")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "a": "\a", "v": "\v", "\n": ""}
_HEX = {"x": 2, "u": 4, "U": 8}


class NotLiteral(ValueError):
    """The text is no literal that JSON has a word for."""


def to_json(text: str) -> str:
    """One literal: strings, numbers, lists, tuples, dicts, True, False, None. Raises NotLiteral."""
    reader = _Reader(text)
    value = reader.value(DEPTH_MAX)
    reader.space()
    if reader.at != len(text):
        raise NotLiteral(text[reader.at : reader.at + 20])
    return value


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def value(self, depth: int) -> str:
        self.space()
        if depth == 0:
            raise NotLiteral("it is nested too deeply")
        char = self.text[self.at : self.at + 1]
        if char in ("'", '"') and char:
            return json.dumps(self._strings(), ensure_ascii=False)
        if char == "[":
            return f"[{', '.join(self._items(']', depth))}]"
        if char == "(":
            return f"[{', '.join(self._items(')', depth))}]"
        if char == "{":
            return f"{{{', '.join(self._pairs(depth))}}}"
        if word := _WORD.match(self.text, self.at):
            self.at = word.end()
            if word[0] not in _WORDS:
                raise NotLiteral(word[0])
            return _WORDS[word[0]]
        return self._number()

    def _number(self) -> str:
        found = _NUMBER.match(self.text, self.at)
        if found is None:
            raise NotLiteral(self.text[self.at : self.at + 20])
        self.at = found.end()
        sign = "-" if found[0][0] == "-" else ""
        whole = (found[1] or "0").replace("_", "").lstrip("0") or "0"
        fraction = found[2] or found[3] or ""
        return sign + whole + ("" if fraction == "." else fraction) + (found[4] or "")

    def _items(self, end: str, depth: int) -> list[str]:
        items: list[str] = []
        self.at += 1
        while not self._ends(end):
            items.append(self.value(depth - 1))
            self._comma(end)
        return items

    def _pairs(self, depth: int) -> list[str]:
        pairs: list[str] = []
        self.at += 1
        while not self._ends("}"):
            if self.text[self.at : self.at + 1] not in ("'", '"'):
                raise NotLiteral("a key that is no string")
            key = json.dumps(self._strings(), ensure_ascii=False)
            self.space()
            if self.text[self.at : self.at + 1] != ":":
                raise NotLiteral("a key without a value")
            self.at += 1
            pairs.append(f"{key}: {self.value(depth - 1)}")
            self._comma("}")
        return pairs

    def _ends(self, end: str) -> bool:
        self.space()
        if self.text[self.at : self.at + 1] == end:
            self.at += 1
            return True
        if self.at >= len(self.text):
            raise NotLiteral("it has no end")
        return False

    def _comma(self, end: str) -> None:
        self.space()
        char = self.text[self.at : self.at + 1]
        if char == ",":
            self.at += 1
        elif char != end:
            raise NotLiteral("a comma is missing")

    def _strings(self) -> str:
        """Strings side by side are one."""
        whole = ""
        while self.text[self.at : self.at + 1] in ("'", '"') and self.at < len(self.text):
            whole += self._string()
            self.space()
        return whole

    def _string(self) -> str:
        quote, chars = self.text[self.at], list[str]()
        self.at += 1
        while True:
            char = self.text[self.at : self.at + 1]
            self.at += 1
            if not char:
                raise NotLiteral("a string has no end")
            if char == quote:
                return paired("".join(chars))
            chars.append(self._escape() if char == "\\" else char)

    def _escape(self) -> str:
        char = self.text[self.at : self.at + 1]
        self.at += 1
        if char not in _HEX:
            # Python keeps the backslash of an escape that it does not know.
            return _ESCAPES.get(char, char if char in "\\'\"" else "\\" + char)
        digits = self.text[self.at : self.at + _HEX[char]]
        self.at += _HEX[char]
        try:
            return chr(int(digits, 16))
        except (ValueError, OverflowError) as error:
            raise NotLiteral(digits) from error
