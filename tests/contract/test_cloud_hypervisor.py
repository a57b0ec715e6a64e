# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What we send to Cloud Hypervisor, held against its own API description and its own program.

The description is the file that ``AGENTFLEET_CLOUD_HYPERVISOR_OPENAPI`` names; without it, the recorded table beside
this file, which has of it what we use (``python tests/contract/test_cloud_hypervisor.py FILE VERSION`` prints it anew).
The command line is held against the help of the program that ``AGENTFLEET_CLOUD_HYPERVISOR`` names.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
import yaml

from ansible_collections.agentfleet.metal.plugins.module_utils import _cloud_hypervisor_config as config

NONE = type(None)
RECORDED = Path(__file__).with_name("cloud_hypervisor.yml")
SOURCE = "vmm/src/api/openapi/cloud-hypervisor.yaml of the project cloud-hypervisor"
OPENAPI = os.environ.get("AGENTFLEET_CLOUD_HYPERVISOR_OPENAPI")
PROGRAM = os.environ.get("AGENTFLEET_CLOUD_HYPERVISOR")
SCHEMAS = {name: value for name, value in vars(config).items() if dataclasses.is_dataclass(value) and name != "Schema"}
TYPES = {int: "integer", str: "string", bool: "boolean"}


def kind(value: dict[str, t.Any], schemas: dict[str, t.Any]) -> t.Any:
    """A property in one word: its type, the schema's name, a list of one of them, or the values of an enumeration."""
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return schemas[name].get("enum", name)
    return [kind(value["items"], schemas)] if value["type"] == "array" else value["type"]


def reduced(document: dict[str, t.Any], version: str) -> dict[str, t.Any]:
    """An API description as the recorded table has it, with what we use of it."""
    schemas = document["components"]["schemas"]
    paths: dict[str, t.Any] = {}
    for path, methods in document["paths"].items():
        ((method, operation),) = methods.items()
        content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        paths[path.lstrip("/")] = [method, kind(content["schema"], schemas) if content else None]
    return {
        "source": SOURCE,
        "version": version,
        "paths": {path: paths[path] for path in [*config.REQUESTS, *config.QUESTIONS] if path in paths},
        "schemas": {
            name: {
                "required": sorted(schemas[name].get("required", [])),
                "properties": {
                    field.name: kind(schemas[name]["properties"][field.name], schemas)
                    for field in dataclasses.fields(SCHEMAS[name])
                    if field.name in schemas[name]["properties"]
                },
            }
            for name in SCHEMAS
            if name in schemas
        },
    }


@pytest.fixture(scope="module")
def described() -> dict[str, t.Any]:
    """The API description, reduced."""
    if OPENAPI:
        return reduced(yaml.safe_load(Path(OPENAPI).read_text()), "given")
    return t.cast("dict[str, t.Any]", yaml.safe_load(RECORDED.read_text()))


def ours(annotation: t.Any) -> t.Any:
    """The kind of one of our fields; values of a Literal as a set."""
    if t.get_origin(annotation) is t.Literal:
        return set(t.get_args(annotation))
    options = [one for one in t.get_args(annotation) if one is not NONE]
    if t.get_origin(annotation) is tuple:
        return [ours(options[0])]
    if options:
        return ours(options[0])
    return TYPES.get(annotation, getattr(annotation, "__name__", annotation))


@pytest.mark.skipif(not OPENAPI, reason="AGENTFLEET_CLOUD_HYPERVISOR_OPENAPI names no API description")
def test_the_recorded_table_is_what_the_description_says(described: t.Any) -> None:
    recorded = yaml.safe_load(RECORDED.read_text())
    assert {**recorded, "version": ""} == {**described, "version": ""}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_has_our_keys_and_types_and_is_given_what_it_requires(name: str, described: t.Any) -> None:
    schema = described["schemas"][name]
    hints = t.get_type_hints(SCHEMAS[name])
    for field in dataclasses.fields(SCHEMAS[name]):
        assert field.name in schema["properties"], f"{name} has no {field.name}: it would be ignored"
        mine, theirs = ours(hints[field.name]), schema["properties"][field.name]
        if isinstance(mine, set):
            assert theirs == "string" or mine <= set(theirs), f"{name}.{field.name}"
        else:
            assert mine == theirs, f"{name}.{field.name}"
    always = {
        field.name for field in dataclasses.fields(SCHEMAS[name])
        if type(None) not in t.get_args(hints[field.name])
    }  # fmt: skip
    assert set(schema["required"]) <= always


def test_every_request_is_described(described: t.Any) -> None:
    wanted = {path: ["put", sent.__name__ if sent else None] for path, sent in config.REQUESTS.items()}
    wanted |= {path: ["get", None] for path in config.QUESTIONS}
    assert described["paths"] == wanted


def full(schema: t.Any) -> t.Any:
    """An object with a value in every field."""

    def value(annotation: t.Any) -> t.Any:
        if t.get_origin(annotation) is t.Literal:
            return t.get_args(annotation)[0]
        options = [one for one in t.get_args(annotation) if one is not NONE]
        if t.get_origin(annotation) is tuple:
            return (value(options[0]),)
        if options:
            return value(options[0])
        return {int: 1, str: "x", bool: True}[annotation] if annotation in TYPES else full(annotation)

    hints = t.get_type_hints(schema)
    given = {field.name: value(hints[field.name]) for field in dataclasses.fields(schema)}
    return schema(**({**given, "hotplug_method": "virtio-mem"} if "hotplug_method" in given else given))


def test_every_body_has_the_described_form_all_the_way_down(described: t.Any) -> None:
    def check(value: t.Any, wanted: t.Any, where: str) -> None:
        if isinstance(wanted, list) and not isinstance(value, list):
            assert value in wanted, where
        elif isinstance(wanted, list):
            for item in value:
                check(item, wanted[0], f"{where}[]")
        elif wanted in TYPES.values():
            assert {True: "boolean"}.get(value is True, TYPES.get(type(value))) == wanted, where
        else:
            properties = described["schemas"][wanted]["properties"]
            assert set(value) <= set(properties), where
            assert set(described["schemas"][wanted]["required"]) <= set(value), where
            for key, item in value.items():
                check(item, properties[key], f"{where}.{key}")

    for name, schema in SCHEMAS.items():
        check(full(schema).body(), name, name)


@pytest.mark.skipif(not PROGRAM, reason="AGENTFLEET_CLOUD_HYPERVISOR names no program")
def test_the_program_takes_our_command_line() -> None:
    done = subprocess.run([str(PROGRAM), "--help"], capture_output=True, text=True, timeout=60, check=True)
    texts = re.split(r"\n\s+(?:-\w, )?(?=--[a-z])", done.stdout)
    help_of = {text.split()[0]: text for text in texts if text.startswith("--")}
    argv = full(config.VmConfig).arguments()
    options = [word for word in argv if word.startswith("--")]
    assert [option for option in options if option not in help_of] == []
    for position, option in enumerate(argv):
        following = argv[position + 1 : position + 2]
        if not option.startswith("--") or not following or "=" not in following[0]:
            continue
        keys = re.findall(r"(?:^|,)(\w+)=", following[0])
        missing = [key for key in keys if f"{key}=" not in help_of[option]]
        assert missing == [], option


if __name__ == "__main__":
    table = reduced(yaml.safe_load(Path(sys.argv[1]).read_text()), sys.argv[2])
    lines = yaml.safe_dump(table, sort_keys=False, default_flow_style=None, width=1000)
    sys.stdout.write(
        "# Copyright: agentfleet.metal contributors\n"
        "# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)\n"
        "# SPDX-License-Identifier: GPL-3.0-or-later\n"
        "# Names and types of what we send, of the API description named here; made by test_cloud_hypervisor.py.\n"
        "# yamllint disable rule:line-length\n"
        "---\n" + lines
    )
