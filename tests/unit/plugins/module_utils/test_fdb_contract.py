# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Our modules and the double of FoundationDB against what FoundationDB's own sources say (tests/contract/foundationdb.json)."""

from __future__ import annotations

import ast
import configparser
import json
import re
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._fdb import NEEDS
from ansible_collections.agentfleet.metal.plugins.module_utils._fdb_database import (
    ALREADY_EXISTS,
    ENGINES,
    NEVER_CREATED,
    Database,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._fdb_server import (
    ENDED,
    NOT_RUNNING,
    OldBackups,
    Servers,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Step
from ansible_collections.agentfleet.metal.tests.unit.threefs_lab import DOUBLES, load

RECORD = json.loads((DOUBLES.parent / "contract/foundationdb.json").read_text())
SOURCE = DOUBLES / "foundationdb/fdb_double.py"
RELEASE = "/opt/foundationdb/1"
THREE = ["10.0.0.1:4500", "10.0.0.2:4500", "10.0.0.3:4500"]
WISH: dict[str, t.Any] = {
    "release": RELEASE,
    "connection": "metal:abc@" + ",".join(THREE),
    "address": "10.0.0.1",
    "machines": ["10.0.0.1", "10.0.0.2", "10.0.0.3"],
    "coordinators": THREE,
    "redundancy": "double",
    "processes": 2,
    "memory": "8GiB",
    "backup_agents": 1,
    "backup": {"directory": "/backup", "drill_database": "drill"},
}
CLI = RECORD["texts"]["fdbcli"]
BACKUP = RECORD["texts"]["fdbbackup"]
RESTORE = RECORD["texts"]["fdbrestore"]


@pytest.fixture(scope="module")
def double() -> t.Any:
    return load("fdb_double", SOURCE)


@pytest.fixture
def host(fake_host: t.Any, monkeypatch: pytest.MonkeyPatch) -> t.Any:
    """A host with the programs, where waiting ends at once."""
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    fake_host.answers["systemctl"] = ""
    names = ("fdbmonitor", "fdbcli", "fdbserver", "fdbbackup", "fdbrestore", "backup_agent")
    return fake_host.files({f"{RELEASE}/bin/{name}": "" for name in names})


def check_command(line: str) -> str:
    """A command line's options and commands are recorded; returns the program, with its command."""
    program, *words = line.split()
    tables = RECORD["options"][program]
    verb = "" if "" in tables else words.pop(0)
    allowed = tables[verb]
    while words:
        word = words.pop(0)
        if word == "--exec":  # the rest
            for command in " ".join(words).strip("\"'").split(";"):
                assert command.split()[0] in RECORD["commands"], command
            break
        if word in allowed["values"]:
            assert words and not re.match(r"--?[a-z]", words.pop(0)), line
        else:
            assert word in allowed["flags"], f"{program} {verb} does not know {word}"
    return f"{program} {verb}".strip()


def test_units_and_configuration_say_what_the_programs_take(host: t.Any) -> None:
    files = Servers(host, WISH)._files()
    seen = set()
    for text in files.values():
        for part in text.split(f"{RELEASE}/bin/")[1:]:
            line = part.split("\n")[0].replace('"$$USER_KEYS"', "KEYS")
            # commands of fdbcli have a semicolon of their own
            seen.add(check_command(line if "--exec" in line and "|" not in line else re.split(r"[|;)]", line)[0]))
    assert seen >= {
        *("fdbmonitor", "fdbcli", "fdbbackup start", "fdbbackup wait", "fdbbackup describe", "fdbbackup delete"),
        *("fdbrestore start", "fdbrestore abort", "fdbrestore status"),
    }

    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(files["/etc/foundationdb/foundationdb.conf"])
    assert set(parser["fdbmonitor"]) <= set(RECORD["fdbmonitor"])
    for program in ("fdbserver", "backup_agent"):
        values = RECORD["options"][program][""]["values"]
        given = {*parser["general"], *parser[program]} - (set(RECORD["fdbmonitor"]) - {"memory"})
        assert given and {re.sub(r"^locality-\w+$", "locality-", key) for key in given} <= {v[2:] for v in values}


def test_commands_say_what_the_programs_take(host: t.Any) -> None:
    host.files({"/etc/foundationdb/fdb.cluster": WISH["connection"]})
    said = {}
    for engine in ENGINES:
        for data in (["new", "triple", engine], [engine, "storage_migration_type=aggressive"]):
            database = Database(host, {**WISH, "engine": engine})
            host.answers[f"{RELEASE}/bin/fdbcli"] = "{}"
            database.wait = -1
            with pytest.raises(Exception, match="not within"):
                database.apply(Step("configure", "database", data=data))
            said[" ".join(data)] = host.calls[-2]
    with pytest.raises(Exception, match="not within"):
        database.apply(Step("move", "coordinators"))
    old = OldBackups(host, "foundationdb", RELEASE, "backup")
    old._fdbbackup("status")
    old._fdbbackup("abort")
    lines = [call.removeprefix(f"{RELEASE}/bin/") for call in host.calls]
    assert {check_command(line) for line in lines} == {"fdbcli", "fdbbackup status", "fdbbackup abort"}
    for line in lines:
        if " configure " in line:
            for word in line.split(" configure ")[1].split():
                key, equals, value = word.partition("=")
                assert key in RECORD["configure"]["keys" if equals else "words"]
                assert not equals or value in RECORD["status"][f"cluster.configuration.{key}"]


class Spy(dict):  # type: ignore[type-arg]
    """Notes which keys are read."""

    def __init__(self, seen: set[str], path: str = "") -> None:
        super().__init__()
        self.seen, self.path = seen, path

    def get(self, key: str, _default: t.Any = None) -> t.Any:  # type: ignore[override]
        return self[key]

    def __getitem__(self, key: str) -> t.Any:
        path = f"{self.path}.{key}".lstrip(".")
        self.seen.add(path)
        if path == "client.coordinators.coordinators":
            return [Spy(self.seen, path)]
        return f"{key}" if path in RECORD["status"] else Spy(self.seen, path)


def known(path: str) -> bool:
    """A path of ``status json``, or the beginning of one."""
    return any(recorded == path or recorded.startswith(f"{path}.") for recorded in RECORD["status"])


def test_status_has_what_is_read_of_it(host: t.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    host.answers[f"{RELEASE}/bin/fdbcli"] = "{}"
    monkeypatch.setattr("json.loads", lambda _text: Spy(seen))
    Database(host, WISH).status()
    monkeypatch.undo()
    assert len(seen) > 15 and [path for path in seen if not known(path)] == []
    assert NEVER_CREATED in RECORD["status"]["cluster.recovery_state.name"]
    assert set(NEEDS) <= set(RECORD["status"]["cluster.configuration.redundancy_mode"])
    for engine, told in ENGINES.items():
        assert set(told) <= set(RECORD["status"]["cluster.configuration.storage_engine"])
        assert engine in RECORD["configure"]["words"]


def test_texts_that_decide_are_said_and_in_no_other_case() -> None:
    ended = [text for text in BACKUP["stdout"] if any(word in text for word in ENDED)]
    assert all(any(word in text for text in ended) for word in ENDED)
    going = [text for text in BACKUP["stdout"] if text.startswith("The backup on tag") and " is " in text]
    assert len(going) == 3 and not set(going) & set(ended)
    assert [text for text in BACKUP["exit_1"] if NOT_RUNNING in text] == ["ERROR: A backup was not running on tag `%s'"]
    assert len([text for text in CLI["exit_1"] if ALREADY_EXISTS in text]) == 1
    assert [text for text in CLI["stderr"] if text.startswith("ERROR: ")], "which is why the exit code is not enough"


def test_units_look_for_texts_that_are_said(host: t.Any) -> None:
    units = " ".join(Servers(host, WISH)._files().values())
    assert set(re.findall(r'grep (?:-i )?"([^"]*)"', units)) == {
        "restorable: true",
        "State: completed",
        "^.agentfleet-drill/",
    }
    assert [text for text in BACKUP["stdout"] if "restorable: " in text.lower()] == ["Restorable: %s"]
    assert any("State: %s" in text for text in RESTORE["stdout"]) and "completed" in RESTORE["stdout"]
    assert "`%s'" in CLI["stdout"], "of getrangekeys"


def template(node: ast.expr) -> str | None:
    """The text of a literal, with ``%s`` for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    elif isinstance(node, ast.JoinedStr):
        text = "".join(part.value if isinstance(part, ast.Constant) else "%s" for part in node.values)  # type: ignore[misc]
    else:
        return None
    return re.sub(r"(?:%s)+", "%s", text).strip("\n")


def test_the_double_says_what_the_programs_say(double: t.Any) -> None:
    texts = {kind: {text for said in RECORD["texts"].values() for text in said[kind]} for kind in CLI}
    streams = {"out": texts["stdout"], "warn": texts["stderr"], "fail": texts["exit_1"]}
    said = []
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in streams:
            text = template(node.args[0])
            said += [(node.func.id, text)] if text else []
    numbered = re.compile(r" (?:1515|2104) %s$")
    assert len(said) > 50
    assert [(kind, text) for kind, text in said if numbered.sub(" %s %s", text) not in streams[kind]] == []
    assert {text: code for code, text in double.ERRORS.items()}.items() <= RECORD["errors"].items()
    assert set(double.STATES.values()) <= set(BACKUP["stdout"])
    assert set(double.OWN) <= set(RECORD["fdbmonitor"])
    assert {"unitialized", "queued", "completed", "aborted"} <= set(RESTORE["stdout"])


def test_the_double_takes_what_the_programs_take(double: t.Any) -> None:
    assert f"FoundationDB {'.'.join(RECORD['version'].split('.')[:2])}." in SOURCE.read_text(), (
        "the release that it says it is"
    )
    for kind, tables in (("values", double.VALUES), ("flags", double.FLAGS)):
        for name, given in tables.items():
            program, _space, verb = name.partition(" ")
            assert set(given) <= set(RECORD["options"][program][verb][kind]), name
    assert {name.split()[0] for name in double.VALUES} == set(double.PROGRAMS) == set(RECORD["options"])
    assert set(double.ENGINES) | set(double.COPIES) <= set(RECORD["configure"]["words"])
    assert list(double.MIGRATIONS) == RECORD["status"]["cluster.configuration.storage_migration_type"]
    commands = re.findall(r'words\[0\] == "(\w+)"', SOURCE.read_text())
    assert len(set(commands)) == 6 and set(commands) <= set(RECORD["commands"])


def paths(value: t.Any, path: str = "") -> t.Iterator[tuple[str, t.Any]]:
    """Where everything of a report is; processes and machines by any name."""
    if isinstance(value, list):
        for item in value:
            yield from paths(item, path)
    elif isinstance(value, dict):
        for name, item in value.items():
            key = "*" if path in ("cluster.machines", "cluster.processes") else name
            yield from paths(item, f"{path}.{key}".lstrip("."))
    else:
        yield path, value


@pytest.mark.parametrize("machines", [0, 1, 2])
@pytest.mark.parametrize("redundancy", ["", "double"])
def test_the_double_reports_what_status_reports(double: t.Any, redundancy: str, machines: int) -> None:
    class Cluster:
        name, coordinators, path = "metal:abc", THREE, "/etc/foundationdb/fdb.cluster"

    living = [{"machine": f"10.0.0.{number}", "address": f"10.0.0.{number}:4500"} for number in range(machines)]
    document = {"redundancy": redundancy, "engine": "ssd", "migration": "disabled"}
    report = double.report(Cluster, THREE, {"document": document, "processes": living})
    for path, value in paths(report):
        what = RECORD["status"][path]
        assert value in what if isinstance(what, list) else type(value).__name__ == what, path
    available = bool(redundancy) and machines == 2
    assert ("configuration" in report["cluster"]) is report["client"]["database_status"]["available"] is available


def test_the_double_refuses_what_the_programs_do_not_take(double: t.Any, capsys: pytest.CaptureFixture[str]) -> None:
    for program, arguments in (
        (double.fdbbackup, ["start", "--tag", "x"]),
        (double.fdbbackup, ["delete", "-C", "/fdb.cluster", "-d", "file:///b"]),
        (double.fdbrestore, ["status", "-C", "/fdb.cluster"]),
        (double.fdbcli, ["--exec"]),
    ):
        with pytest.raises(SystemExit) as left:
            program(arguments)
        assert left.value.code == 1 and capsys.readouterr().err.startswith("ERROR: ")


def test_the_doubles_fdbmonitor_starts_what_our_configuration_lists(
    double: t.Any, host: t.Any, tmp_path: t.Any
) -> None:
    conf = tmp_path / "foundationdb.conf"
    conf.write_text(Servers(host, WISH)._files()["/etc/foundationdb/foundationdb.conf"])
    started = double._conf(str(conf))
    assert list(started) == ["fdbserver.4500", "fdbserver.4501", "backup_agent.1"]
    for section, (command, *arguments) in started.items():
        options, rest = double.options_of(section.partition(".")[0], arguments)
        assert command.startswith(f"{RELEASE}/bin/") and rest == [] and options["cluster"]
    options, _rest = double.options_of("fdbserver", started["fdbserver.4501"][1:])
    assert options["address"] == "10.0.0.1:4501" and options["locality-machineid"] == "10.0.0.1"
    assert options["memory"] == "8GiB" and options["data"].endswith("/data/4501")
