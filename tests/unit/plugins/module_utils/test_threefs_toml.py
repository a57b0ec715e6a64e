# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""TOML that is changed in place: _threefs_toml."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_toml import Toml, TomlError, emit

TEXT = '''\
top = 1 # first
name = "a \\"quoted\\" # name"
literal = 'C:\\path'
long = """
two
lines"""
list = [ 1, 2, # two
  3 ]
inline = { a = 1, b.c = 'x' }
when = 2026-11-22T01:02:03Z
hex = 0x10

[server.base]
x = 1.5

[[server.base.groups]]
network_type = 'RDMA'
[server.base.groups.listener]
#gid_index = 0
listen_port = 8000 # handshake

[[server.base.groups]]
network_type = 'TCP'
[server.base.groups.listener]
listen_port = 9000
'''


def test_values_of_all_kinds() -> None:
    data = Toml(TEXT).data
    assert data["name"] == 'a "quoted" # name' and data["literal"] == "C:\\path" and data["long"] == "two\nlines"
    assert data["list"] == [1, 2, 3] and data["inline"] == {"a": 1, "b": {"c": "x"}} and data["hex"] == 16
    assert [group["listener"]["listen_port"] for group in data["server"]["base"]["groups"]] == [8000, 9000]


def test_it_reads_what_the_standard_library_reads() -> None:
    tomllib = pytest.importorskip("tomllib")
    ours, theirs = Toml(TEXT).data, tomllib.loads(TEXT)
    assert {**ours, "when": None} == {**theirs, "when": None}


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("top", 2, "top = 2 # first"),
        ("server.base.groups[RDMA].listener.listen_port", 8002, "listen_port = 8002 # handshake"),
        ("server.base.groups[1].listener.listen_port", 9002, "listen_port = 9002"),
        ("list", [4], "list = [4]"),
    ],
)
def test_a_value_is_replaced_and_its_comment_stays(key: str, value: t.Any, line: str) -> None:
    document = Toml(TEXT)
    (path,) = document.resolve(key)
    assert document.set(path, value) and not document.set(path, value)
    assert line in document.text.splitlines() and document.get(path) == value
    before, after = TEXT.splitlines(), document.text.splitlines()
    assert len(set(before) - set(after)) <= 2, "nothing else changed"


def test_a_new_key_lands_in_its_table_of_its_array_element() -> None:
    document = Toml(TEXT)
    document.set(document.resolve("server.base.groups[RDMA].listener.backlog")[0], 1)
    document.set(document.resolve("server.base.groups[RDMA].worker.threads")[0], 2)
    document.set(document.resolve("other.table.key")[0], "x")
    first, second = document.data["server"]["base"]["groups"]
    assert first["listener"]["backlog"] == 1 and first["worker"] == {"threads": 2}
    assert "worker" not in second and "backlog" not in second["listener"]
    assert document.data["other"]["table"]["key"] == "x"


def test_everywhere_and_nowhere() -> None:
    document = Toml(TEXT)
    ports = document.resolve("**.listener.listen_port")
    assert document.update(dict.fromkeys(ports, 1)) == ports and document.update(dict.fromkeys(ports, 1)) == []
    assert document.resolve("**.no_such") == [] and document.resolve("server.base.groups[UDP].x") == []


def test_examples_in_comments_are_known_keys() -> None:
    document = Toml(TEXT)
    known = {key: document.knows(document.resolve(key)[0]) for key in ("top", "toop", "server.base", "server.base.y")}
    assert known == {"top": True, "toop": False, "server.base": True, "server.base.y": False}
    assert document.knows(document.resolve("server.base.groups[RDMA].listener.gid_index")[0])
    assert not document.knows(document.resolve("server.base.groups[TCP].listener.gid_index")[0])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a = 1\na = 2", "line 2: a is defined twice"),
        ("[a]\n[a]", "line 2: a is defined twice"),
        ('a = "x', "line 1: a string is not closed"),
        ("a = [1,\n", "no value"),
        ("a = 1 2", "line 1: unexpected '2'"),
        ("a = yes", "line 1: 'yes' is no value"),
        ("[[a]\n", "line 1: a table's name is not closed"),
        ("a = 1\n[a.b]", "line 2: a.b lies inside of a value"),
        ("= 1", "line 1: not a key"),
        ("a", "line 1: no = after the key"),
        ('a = "\\q"', "line 1: no such escape"),
    ],
)
def test_what_is_no_toml_is_refused_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(TomlError) as error:
        Toml(text)
    assert problem in str(error.value)


def test_a_place_that_cannot_be() -> None:
    document = Toml(TEXT)
    for path, problem in (
        (("server", "base"), "server.base is a table"),
        (("top", "x"), "top is a value, not a table"),
        (("server", "base", "groups", 7, "x"), "server.base.groups[7] does not exist"),
    ):
        with pytest.raises(TomlError) as error:
            document.set(t.cast("t.Any", path), 1)
        assert problem in str(error.value)


@pytest.mark.parametrize("value", [True, 3, 0.5, 'x\n"\\\x7f', ["a", 1], {"a b": [1], "c": {"d": False}}])
def test_what_is_written_is_read_again(value: t.Any) -> None:
    assert Toml(f"a = {emit(value)}").data == {"a": value}
