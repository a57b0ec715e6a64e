# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Secrets inside of other options reach neither the host's log nor what Ansible prints of a call."""

from __future__ import annotations

import importlib
import json
import typing as t
from pathlib import Path

import pytest
from ansible.module_utils import basic
from ansible.module_utils.testing import patch_module_args

from ansible_collections.agentfleet.metal.plugins import modules

SECRET = "-----BEGIN KEY-----\nc2VjcmV0\\Y29kZQ\n-----END KEY-----\n"
PARTS = ("BEGIN", "c2VjcmV0", "Y29kZQ")
NAMES = sorted(path.stem for path in Path(modules.__path__[0]).glob("[a-z]*.py"))


class Made(Exception):
    """Raised instead of running a module: how it is made."""


def made(name: str) -> tuple[type[basic.AnsibleModule], dict[str, t.Any]]:
    """The class of a module and its options."""

    def init(module: t.Any, argument_spec: dict[str, t.Any], **_rest: t.Any) -> None:
        raise Made(type(module), argument_spec)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(basic.AnsibleModule, "__init__", init)
        with pytest.raises(Made) as found:
            importlib.import_module(f"{modules.__name__}.{name}").main()
    kind, options = found.value.args
    return kind, options


def has_secret(option: dict[str, t.Any]) -> bool:
    """Whether an option is secret, or one in it is."""
    return bool(option.get("no_log")) or any(has_secret(inner) for inner in option.get("options", {}).values())


def example(options: dict[str, t.Any]) -> dict[str, t.Any]:
    """Values for what is required, and the secret for all that is secret."""
    found: dict[str, t.Any] = {}
    for name, option in options.items():
        if option.get("required") or has_secret(option):
            value: t.Any = {"int": 1, "bool": True}.get(option["type"], "x")
            value = SECRET if option.get("no_log") else option.get("choices", [value])[0]
            value = example(option["options"]) if "options" in option else value
            found[name] = [value] if option["type"] == "list" else value
    return found


NESTED = [name for name in NAMES if any(has_secret(one) for one in made(name)[1].values() if not one.get("no_log"))]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is sent to the host's log."""
    lines: list[str] = []
    monkeypatch.setattr(basic, "has_journal", False)
    monkeypatch.setattr(basic.syslog, "openlog", lambda *_: None)
    monkeypatch.setattr(basic.syslog, "syslog", lambda _priority, line: lines.append(line))
    return lines


def test_they_are_found() -> None:
    assert {"kvcache_pool", "microvm", "threefs_config", "threefs_user"} <= set(NESTED)


@pytest.mark.parametrize("name", NESTED)
def test_secrets_of_many_lines_stay_secret(name: str, logged: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    kind, options = made(name)
    with patch_module_args(example(options)):
        # what is logged without our class, so that this test notices when Ansible logs in another way
        basic.AnsibleModule(argument_spec=options)
        (line,) = logged
        assert all(part in line for part in PARTS)
        logged.clear()
        module = kind(argument_spec=options)
        with pytest.raises(SystemExit):
            module.exit_json(given=module.params)  # as Ansible does for -vvv
    assert logged == ["Invoked"]
    printed = capsys.readouterr().out
    assert json.loads(printed)["given"]
    assert "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER" in printed
    assert not any(part in printed for part in PARTS)
