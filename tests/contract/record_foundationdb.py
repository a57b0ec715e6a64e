#!/usr/bin/env python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Record what FoundationDB's programs take and say, from a git checkout of its source.

    tests/contract/record_foundationdb.py foundationdb > tests/contract/foundationdb.json

Recorded are names and texts alone: options (and which of them take a value), commands, words of ``configure``, keys that
fdbmonitor keeps for itself, keys of ``status json`` with the values that some can have, errors of locks, backups and
restores, and the texts of those functions that our modules and our double have to do with, by the stream that they go to;
those on stderr after which the exit code is 1 stand for themselves. What is filled in is ``%s`` everywhere.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import typing as t
from pathlib import Path

BACKUP = "fdbbackup/backup.actor.cpp"
AGENT = "fdbclient/FileBackupAgent.actor.cpp"
FLOW = "flow/include/flow/genericactors.actor.h"
CLI = "fdbcli/fdbcli.actor.cpp"
# program -> file, table of its options, or those of its commands
OPTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "fdbcli": (CLI, {"": "g_rgOptions"}),
    "fdbserver": ("fdbserver/fdbserver.actor.cpp", {"": "g_rgOptions"}),
    "fdbmonitor": ("fdbmonitor/fdbmonitor.cpp", {"": "g_rgOptions"}),
    "backup_agent": (BACKUP, {"": "g_rgAgentOptions"}),
    "fdbbackup": (
        BACKUP,
        {
            verb: f"g_rgBackup{verb.title()}Options"
            for verb in ("start", "status", "abort", "wait", "delete", "describe", "list", "expire")
        },
    ),
    "fdbrestore": (BACKUP, dict.fromkeys(("start", "status", "abort", "wait"), "g_rgRestoreOptions")),
}
# program -> file, how a function of it begins
FUNCTIONS: dict[str, list[tuple[str, str]]] = {
    "fdbcli": [
        ("fdbcli/ConfigureCommand.actor.cpp", "	switch (result) {"),
        ("fdbcli/CoordinatorsCommand.actor.cpp", "ACTOR Future<Void> printCoordinatorsInfo("),
        ("fdbcli/CoordinatorsCommand.actor.cpp", "ACTOR Future<bool> changeCoordinators("),
        ("fdbcli/StatusCommand.actor.cpp", "		else if (level == StatusClient::MINIMAL) {"),
        (CLI, "ACTOR Future<Void> commitTransaction("),
        (CLI, "ACTOR Future<Void> timeExit("),
        (CLI, '				if (tokencmp(tokens[0], "parse_error")) {'),
        (CLI, "				if (multi) {"),
        (CLI, "				if (is_error) {"),
        (CLI, "				if (!helpMap.count(tokens[0]"),
        (CLI, '				if (tokencmp(tokens[0], "getrange") ||'),
        (CLI, '				if (tokencmp(tokens[0], "writemode")) {'),
        (CLI, '				if (tokencmp(tokens[0], "clearrange")) {'),
        ("fdbclient/ClusterConnectionFile.actor.cpp", "std::string ClusterConnectionFile::getErrorString("),
    ],
    "fdbbackup": [
        (BACKUP, "ACTOR Future<Void> submitBackup("),
        (BACKUP, "ACTOR Future<Void> statusBackup("),
        (BACKUP, "ACTOR Future<Void> abortBackup("),
        (BACKUP, "ACTOR Future<Void> waitBackup("),
        (BACKUP, "ACTOR Future<Void> deleteBackupContainer("),
        (BACKUP, "ACTOR Future<Void> describeBackup("),
        (BACKUP, "Reference<IBackupContainer> openBackupContainer("),
        (
            BACKUP,
            "			switch (backupType) {\n			case BackupType::START: {\n				if (!initCluster",
        ),
        (BACKUP, "			switch (lastError) {"),
        (AGENT, "	ACTOR static Future<std::string> getStatus(FileBackupAgent*"),
        ("fdbclient/BackupAgentBase.actor.cpp", "const char* BackupAgentBase::getStateText("),
        ("fdbclient/BackupContainer.actor.cpp", "std::string BackupDescription::toString("),
        (FLOW, "Future<Optional<T>> stopAfter("),
    ],
    "fdbrestore": [
        (BACKUP, "ACTOR Future<Void> runRestore("),
        (BACKUP, "				if (restoreClusterFileDest.empty()) {"),
        (BACKUP, "				if (!fileExists(restoreClusterFileDest)) {"),
        (BACKUP, "			switch (restoreType) {"),
        (BACKUP, "			switch (lastError) {"),
        (AGENT, "ACTOR Future<std::string> RestoreConfig::getProgress_impl("),
        (AGENT, "	ACTOR static Future<Version> restore(FileBackupAgent*"),
        (AGENT, "StringRef FileBackupAgent::restoreStateText("),
        (FLOW, "Future<Optional<T>> stopAfter("),
    ],
}
ERRORS = ("database_locked", "no_cluster_file_found", "connection_string_invalid")
VALUES = re.compile(r"(?:cluster\.configuration\.(?!regions)|cluster\.(?:data\.state|recovery_state)\.|client\.)")
LITERAL = re.compile(r'"((?:[^"\\\n]|\\.)*)"')


def block(text: str, start: str) -> str:
    """From its beginning to the brace that closes it."""
    at = text.index(start)
    depth = 0
    for match in re.finditer(r'"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)\'|//[^\n]*|[{}]', text[at:]):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if match[0] == "}" and depth == 0:
            return text[at : at + match.end()]
    raise SystemExit(f"{start!r} has no end")


def parts(code: str, begin: str) -> t.Iterator[tuple[str, str]]:
    """What stands in the brackets of a call or up to a semicolon, and what follows it."""
    for match in re.finditer(begin, code):
        depth = 1
        for token in re.finditer(r'"(?:[^"\\\n]|\\.)*"|[();]', code[match.end() :]):
            depth += {"(": 1, ")": -1}.get(token[0], 0)
            if depth == 0 or (token[0] == ";" and depth == 1):
                yield code[match.end() : match.end() + token.start()], code[match.end() + token.end() :]
                break


def text_of(code: str) -> str:
    """The text that an expression makes, or the first argument of a call of ``format``."""
    found, at, called = "", 0, not code.lstrip().startswith('"')
    for match in LITERAL.finditer(code):
        between = code[at : match.start()].strip()
        if at and (called or "+" not in between) and "," in between:
            break  # arguments of what is formatted
        if "+" in between:
            found += "%s"
        elif at and between and not re.fullmatch(r"PRI\w+", between):
            break
        found += json.loads(f'"{match[1]}"')
        at = match.end()
    if at and "+" in code[at:] and "," not in code[at:]:
        found += "%s"
    text = re.sub(r"%[-+0-9.]*(?:ll|z|l)?[a-z]|\{\d*\}", "%s", found)
    return re.sub(r"(?:%s)+", "%s", text.replace("%%", "%")).strip("\n\r")


def texts(code: str) -> t.Iterator[tuple[str, str, bool]]:
    """(stream, text, whether it fails) of a function."""
    for inner, after in parts(code, r"\b(?:f?printf|fmt::print)\s*\("):
        stream = (re.match(r"\s*(stderr|stdout)\s*,", inner) or ["", "stdout"])[1]
        inner = re.sub(r"^\s*(stderr|stdout)\s*,", "", inner)
        end = re.match(r".*?\b(?:break|continue|return|throw)\b[^;]*;", after, re.S) or [""]
        fails = re.search(
            r"is_error = true|ret = false|return (?:false|1\b|FDB_EXIT_ERROR)|throw (?!actor_cancelled)", end[0]
        )
        yield stream, text_of(inner), bool(fails)
    for inner, _after in parts(code, r"(?:statusText \+=|\bmsg =|stateText =|info\.append\(|\breturn )"):
        text = text_of(inner)
        yield "stderr" if text.startswith("ERROR: ") else "stdout", text, False


def spoken(tree: Path, program: str) -> dict[str, list[str]]:
    """Texts of a program by their stream; ``exit_1`` has those on stderr that come with exit code 1."""
    found: dict[str, set[str]] = {"stdout": set(), "stderr": set(), "exit_1": set()}
    for file, start in FUNCTIONS[program]:
        for stream, text, fails in texts(block((tree / file).read_text(encoding="utf-8"), start)):
            if len(text.replace("%s", "").strip(" .,")) > 1 and text not in ("ERROR: %s", "ERROR: %s (%s)"):
                # The functions of fdbbackup and fdbrestore throw after each; fdbcli's main looks whether its command has ended.
                fails = fails or program != "fdbcli" or "timeExit" in start
                found["exit_1" if stream == "stderr" and fails else stream].add(text)
    if program == "fdbcli":  # said as "ERROR: %s"
        code = (tree / "fdbclient/ManagementAPI.actor.cpp").read_text(encoding="utf-8")
        reasons = {
            f"ERROR: {text}"
            for _s, text, _f in texts(block(code, "std::string ManagementAPI::generateErrorMessage("))
            if text
        }
        file_errors = {text for text in found["stdout"] if " cluster file `" in text}
        found["stdout"] -= file_errors
        found["exit_1"] |= reasons | file_errors
    return {kind: sorted(lines) for kind, lines in found.items()}


def options(tree: Path, file: str, table: str) -> dict[str, list[str]]:
    """Options that take a value, and those that take none."""
    code = (tree / file).read_text(encoding="utf-8")
    code = code[re.search(rf"CSimpleOpt::SOption {table}\[\]", code).start() :]  # type: ignore[union-attr]
    found: dict[str, list[str]] = {"values": [], "flags": []}
    for name, kind in re.findall(
        r'\{\s*OPT_\w+,\s*"(-[^"]+)",\s*(SO_\w+)\s*\}', code[: code.index("SO_END_OF_OPTIONS")]
    ):
        found["flags" if kind == "SO_NONE" else "values"].append(name)
    return {kind: sorted(names) for kind, names in found.items()}


def keys(value: t.Any, path: str = "") -> t.Iterator[tuple[str, list[str] | str]]:
    """Dotted paths of a schema with the type or the values of each; ``*`` for any name."""
    if isinstance(value, list):
        value = value[0] if value else ""
    if isinstance(value, dict) and "$enum" in value:
        yield path, value["$enum"]
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from keys(item, f"{path}.{'*' if name == '$map' else name}".lstrip("."))
    else:
        yield path, type(value).__name__


def status(tree: Path) -> dict[str, list[str] | str]:
    """Paths of ``status json`` down to four names, with the values of those that gates look at."""
    code = (tree / "fdbclient/Schemas.cpp").read_text(encoding="utf-8")
    schema = json.loads(re.search(r'JSONSchemas::statusSchema = R"statusSchema\((.*?)\)statusSchema"', code, re.S)[1])  # type: ignore[index]
    return {
        path: what if isinstance(what, str) or VALUES.match(path) else "str"
        for path, what in keys(schema)
        if path.count(".") < 4
    }


def main(place: str) -> None:
    """Print the record."""
    tree = Path(place)
    read = {file: (tree / file).read_text(encoding="utf-8") for file in (CLI, BACKUP, "fdbmonitor/fdbmonitor.cpp")}
    commands = {
        name
        for path in tree.glob("fdbcli/*.cpp")
        for name in re.findall(r'(?:CommandFactory \w+\(\s*|helpMap\[)"(\w+)"', path.read_text(encoding="utf-8"))
    }
    api = (tree / "fdbclient/ManagementAPI.actor.cpp").read_text(encoding="utf-8")
    tokens = block(api, "std::map<std::string, std::string> configForToken(")
    errors = (tree / "flow/include/flow/error_definitions.h").read_text(encoding="utf-8")
    record = {
        "version": re.search(
            r"project\(foundationdb\s+VERSION (\d+\.\d+\.\d+)", (tree / "CMakeLists.txt").read_text(encoding="utf-8")
        )[1],  # type: ignore[index]
        "commit": subprocess.check_output(["git", "-C", place, "rev-parse", "HEAD"], text=True).strip(),
        "options": {
            program: {verb: options(tree, file, table) for verb, table in tables.items()}
            for program, (file, tables) in OPTIONS.items()
        },
        "commands": sorted(commands),
        "configure": {
            "words": sorted(re.findall(r'mode == "([\w-]+)"', tokens)),
            "keys": sorted(set(re.findall(r'key == "(\w+)"', tokens))),
        },
        "fdbmonitor": sorted(
            set(re.findall(r'get_value_multi\(\s*ini,\s*"([\w-]+)"', read["fdbmonitor/fdbmonitor.cpp"]))
            | set(re.findall(r'GetValue\("fdbmonitor", "(\w+)"', read["fdbmonitor/fdbmonitor.cpp"]))
        ),
        "status": status(tree),
        "errors": {
            text: int(code)
            for name, code, text in re.findall(r'^ERROR\( *(\w+), (\d+), "([^"]+)" *\)', errors, re.M)
            if name in ERRORS or "2300" <= code <= "2399"
        },
        "texts": {program: spoken(tree, program) for program in FUNCTIONS},
    }
    json.dump(record, sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main(sys.argv[1])
