# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""TOML files changed in place: values are replaced or added, comments and order stay.

Managed hosts may have a Python without ``tomllib``, and a library that writes TOML
would lose the comments of the files that ship with 3FS; hence a parser that knows
where each value stands. Dates are kept as text; that is all that 3FS never uses.
"""

from __future__ import annotations

import json
import re
import typing as t
from dataclasses import dataclass

Path = tuple[t.Union[str, int], ...]
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SCALAR = re.compile(r"[^\s,\]}#]+")
_ESCAPES = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", '"': '"', "\\": "\\", "e": "\x1b"}


class TomlError(ValueError):
    """A text that is not TOML; the message says in which line."""


@dataclass(frozen=True)
class _Value:
    """Where a value of the document stands."""

    start: int
    end: int
    value: t.Any


@dataclass(frozen=True)
class _Table:
    """A header's table: its path, and where its own lines begin and end."""

    path: Path
    start: int
    end: int


class Toml:
    """A TOML document.

    :param text: the document
    :raises TomlError: it is not TOML
    """

    def __init__(self, text: str) -> None:
        self.text = text if text.endswith("\n") or not text else text + "\n"
        self._parse()

    # -- reading ---------------------------------------------------------------

    def _parse(self) -> None:
        self.data: dict[str, t.Any] = {}
        self._values: dict[Path, _Value] = {}
        self._tables: list[_Table] = []
        headers: set[Path] = set()
        position, path, start = 0, t.cast(Path, ()), 0
        while True:
            position = _match(_BLANK, self.text, position)
            if position >= len(self.text):
                break
            if self.text[position] == "[":
                self._tables.append(_Table(path, start, self._line_start(position)))
                array = self.text.startswith("[[", position)
                keys, position = self._keys(position + (2 if array else 1))
                if not self.text.startswith("]]" if array else "]", position):
                    raise self._error(position, "a table's name is not closed")
                position += 2 if array else 1
                path = self._open(keys, array, position, headers)
                position = start = self._line_end(position)
                continue
            keys, position = self._keys(position)
            if not self.text.startswith("=", position):
                raise self._error(position, "no = after the key")
            begin = _match(_SPACE, self.text, position + 1)
            value, end = self._value(begin)
            self._put(path, keys, _Value(begin, end, value))
            position = self._line_end(end)
        self._tables.append(_Table(path, start, len(self.text)))

    def _error(self, position: int, problem: str) -> TomlError:
        return TomlError(f"line {self.text.count(chr(10), 0, position) + 1}: {problem}")

    def _line_start(self, position: int) -> int:
        return self.text.rfind("\n", 0, position) + 1

    def _line_end(self, position: int) -> int:
        """Behind the rest of the line, which may only be a comment."""
        end = self.text.find("\n", position)
        end = len(self.text) if end < 0 else end
        rest = self.text[position:end].strip()
        if rest and not rest.startswith("#"):
            raise self._error(position, f"unexpected {rest[:20]!r}")
        return min(end + 1, len(self.text))

    def _keys(self, position: int) -> tuple[list[str], int]:
        keys: list[str] = []
        while True:
            position = _match(_SPACE, self.text, position)
            if self.text[position : position + 1] in ('"', "'"):
                key, position = self._string(position)
            else:
                found = _BARE.match(self.text, position)
                if not found:
                    raise self._error(position, "not a key")
                key, position = found.group(), found.end()
            keys.append(key)
            position = _match(_SPACE, self.text, position)
            if not self.text.startswith(".", position):
                return keys, position
            position += 1

    def _open(self, keys: list[str], array: bool, position: int, headers: set[Path]) -> Path:
        """Enter the table of a header; returns its path with the indices of arrays."""
        node: t.Any = self.data
        path: Path = ()
        for number, key in enumerate(keys):
            last = number == len(keys) - 1
            if not isinstance(node, dict):
                raise self._error(position, f"{'.'.join(keys)} lies inside of a value")
            if last and array:
                items = node.setdefault(key, [])
                if not isinstance(items, list) or (*path, key) in self._values:
                    raise self._error(position, f"{'.'.join(keys)} is no array of tables")
                items.append({})
                node, path = items[-1], (*path, key, len(items) - 1)
                break
            node, path = node.setdefault(key, {}), (*path, key)
            if isinstance(node, list) and node and path not in self._values and not (last and not array):
                node, path = node[-1], (*path, len(node) - 1)
        if not isinstance(node, dict) or path in headers or path in self._values:
            raise self._error(position, f"{'.'.join(keys)} is defined twice")
        headers.add(path)
        return path

    def _put(self, path: Path, keys: list[str], value: _Value) -> None:
        node: t.Any = self.data
        for part in path:
            node = node[part]
        for key in keys[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise self._error(value.start, f"{'.'.join(keys)} lies inside of a value")
        if keys[-1] in node:
            raise self._error(value.start, f"{'.'.join(keys)} is defined twice")
        node[keys[-1]] = value.value
        self._values[path + tuple(keys)] = value

    def _value(self, position: int) -> tuple[t.Any, int]:
        character = self.text[position : position + 1]
        if character in ('"', "'"):
            return self._string(position)
        if character == "[":
            items, position = [], _match(_BLANK, self.text, position + 1)
            while not self.text.startswith("]", position):
                item, position = self._value(position)
                items.append(item)
                position = self._next(position, "]", _BLANK)
            return items, position + 1
        if character == "{":
            table: dict[str, t.Any] = {}
            position = _match(_SPACE, self.text, position + 1)
            while not self.text.startswith("}", position):
                keys, position = self._keys(position)
                if not self.text.startswith("=", position):
                    raise self._error(position, "no = after the key")
                value, position = self._value(_match(_SPACE, self.text, position + 1))
                node = table
                for key in keys[:-1]:
                    node = node.setdefault(key, {})
                node[keys[-1]] = value
                position = self._next(position, "}", _SPACE)
            return table, position + 1
        found = _SCALAR.match(self.text, position)
        if not found:
            raise self._error(position, "no value")
        return self._scalar(found.group(), position), found.end()

    def _next(self, position: int, closing: str, space: re.Pattern[str]) -> int:
        position = _match(space, self.text, position)
        if self.text.startswith(",", position):
            return _match(space, self.text, position + 1)
        if not self.text.startswith(closing, position):
            raise self._error(position, f"neither , nor {closing}")
        return position

    def _scalar(self, word: str, position: int) -> t.Any:
        if word in ("true", "false"):
            return word == "true"
        number = word.replace("_", "")
        if re.fullmatch(r"[+-]?(?:0|[1-9]\d*)", number):
            return int(number)
        if re.fullmatch(r"0x[0-9A-Fa-f]+|0o[0-7]+|0b[01]+", number):
            return int(number, 0)
        if re.fullmatch(r"[+-]?(?:\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|inf|nan)", number):
            return float(number)
        if re.match(r"\d{4}-\d\d-\d\d|\d\d:\d\d", word):
            return word
        raise self._error(position, f"{word[:20]!r} is no value")

    def _string(self, position: int) -> tuple[str, int]:
        quote = self.text[position]
        long = self.text.startswith(quote * 3, position)
        mark = quote * 3 if long else quote
        position += len(mark)
        if long and self.text.startswith("\n", position):
            position += 1
        found: list[str] = []
        while True:
            character = self.text[position : position + 1]
            if not character or (character == "\n" and not long):
                raise self._error(min(position, len(self.text)), "a string is not closed")
            if self.text.startswith(mark, position):
                end = position + len(mark)
                while long and self.text.startswith(quote, end) and end - position < 5:
                    found.append(quote)  # up to two quotes may stand before the closing ones
                    end += 1
                return "".join(found), end
            if character == "\\" and quote == '"':
                text, position = self._escape(position + 1)
                found.append(text)
                continue
            found.append(character)
            position += 1

    def _escape(self, position: int) -> tuple[str, int]:
        character = self.text[position : position + 1]
        if character in _ESCAPES:
            return _ESCAPES[character], position + 1
        if character in ("u", "U"):
            length = 4 if character == "u" else 8
            try:
                return chr(int(self.text[position + 1 : position + 1 + length], 16)), position + 1 + length
            except ValueError:
                raise self._error(position, "not a code point") from None
        joined = re.compile(r"[ \t]*\n\s*").match(self.text, position)
        if joined:
            return "", joined.end()
        raise self._error(position, f"no such escape: \\{character}")

    # -- paths -----------------------------------------------------------------

    def resolve(self, dotted: str) -> list[Path]:
        """The paths that a dotted key means.

        ``a.groups[1].b`` takes an element of an array of tables by its index and ``a.groups[RDMA].b`` the one that has
        this word as a value; ``**.c.d`` is every value whose path ends so. A key that is not there yet is one path.
        An empty list says that no element of an array, or nothing for ``**``, fits.
        """
        if dotted.startswith("**."):
            tail = tuple(dotted[3:].split("."))
            return [path for path in self._values if path[-len(tail) :] == tail]
        path: list[str | int] = []
        node: t.Any = self.data
        for part in _parts(dotted):
            name, bracket, selector = part.partition("[")
            path.append(name)
            node = node.get(name) if isinstance(node, dict) else None
            if bracket:
                items = node if isinstance(node, list) else []
                number = _select(items, selector[:-1])
                if number is None:
                    return []
                path.append(number)
                node = items[number]
        return [tuple(path)]

    def get(self, path: Path) -> t.Any:
        """The value at a path; None when there is none."""
        node: t.Any = self.data
        for part in path:
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                return None
        return node

    def knows(self, path: Path) -> bool:
        """Whether the key stands in its table, be it commented out as an example."""
        if path in self._values or isinstance(self.get(path), (dict, list)):
            return True
        example = re.compile(rf"^\s*#\s*{re.escape(str(path[-1]))}\s*=", re.MULTILINE)
        return any(
            example.search(self.text[table.start : table.end]) is not None
            for table in self._tables
            if table.path == path[:-1]
        )

    # -- writing ---------------------------------------------------------------

    def set(self, path: Path, value: t.Any) -> bool:
        """Replace or add a value; returns whether the document changed.

        :raises TomlError: the place lies inside of a value, or an array has no such element
        """
        if path in self._values:
            old = self._values[path]
            if old.value == value and type(old.value) is type(value):
                return False
            self._splice(old.start, old.end, emit(value))
            return True
        if self.get(path) is not None:
            raise TomlError(f"{dotted_path(path)} is a table")
        self._table_of(path)
        own = [table for table in self._tables if table.path == path[:-1]]
        if own:
            place = self._after_values(own[0])
            self._splice(place, place, f"{key_text(path[-1])} = {emit(value)}\n")
            return True
        place = self._end_of_parent(path[:-1])
        header = ".".join(key_text(part) for part in path[:-1] if not isinstance(part, int))
        gap = "" if place == 0 or self.text[:place].endswith("\n\n") else "\n"
        self._splice(place, place, f"{gap}[{header}]\n{key_text(path[-1])} = {emit(value)}\n")
        return True

    def update(self, values: t.Mapping[Path, t.Any]) -> list[Path]:
        """Set many values and parse once for all that are only replaced; returns the paths that changed."""
        present = {path: self._values[path] for path in values if path in self._values}
        stale = [
            path
            for path, old in present.items()
            if old.value != values[path] or type(old.value) is not type(values[path])
        ]
        for path in sorted(stale, key=lambda path: -present[path].start):
            self.text = self.text[: present[path].start] + emit(values[path]) + self.text[present[path].end :]
        self._parse()
        return stale + [path for path in values if path not in present and self.set(path, values[path])]

    def _splice(self, start: int, end: int, text: str) -> None:
        self.text = self.text[:start] + text + self.text[end:]
        self._parse()

    def _table_of(self, path: Path) -> None:
        """Refuse a place that cannot have a table of its own."""
        for length in range(1, len(path)):
            part = path[:length]
            if part in self._values:
                raise TomlError(f"{dotted_path(part)} is a value, not a table")
            if isinstance(path[length - 1], int) and self.get(part) is None:
                raise TomlError(f"{dotted_path(part)} does not exist")

    def _after_values(self, table: _Table) -> int:
        inside = [value.end for value in self._values.values() if table.start <= value.start < table.end]
        if not inside:
            return table.start
        end = self.text.find("\n", max(inside))
        return len(self.text) if end < 0 else end + 1

    def _end_of_parent(self, path: Path) -> int:
        """Behind the last table below the innermost array element (or the document) that the path lies in."""
        inner = max((n for n, part in enumerate(path, 1) if isinstance(part, int)), default=0)
        below = [table for table in self._tables if table.path[:inner] == path[:inner]]
        return below[-1].end


def _match(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    return found.end() if found else position


def _parts(dotted: str) -> list[str]:
    """Split at dots that do not stand in brackets."""
    return re.findall(r"[^.\[]+(?:\[[^\]]*\])?", dotted)


def _select(items: list[t.Any], selector: str) -> int | None:
    if selector.isdigit():
        return int(selector) if int(selector) < len(items) else None
    for number, item in enumerate(items):
        if isinstance(item, dict) and selector in [value for value in item.values() if isinstance(value, str)]:
            return number
    return None


def dotted_path(path: Path) -> str:
    """A path as a user writes it."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


def key_text(key: str | int) -> str:
    """A key as TOML."""
    return str(key) if _BARE.fullmatch(str(key)) else json.dumps(str(key))


def emit(value: t.Any) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(emit(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key_text(key)} = {emit(item)}" for key, item in value.items()) + "}"
    # TOML's basic strings are JSON's, with control characters escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
