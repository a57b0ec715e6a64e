# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The inventory plugin: what it asks, and the hosts, groups and variables that come of the answers."""

from __future__ import annotations

import json
import subprocess
import typing as t
from types import SimpleNamespace

import pytest
import yaml
from ansible import constants
from ansible.errors import AnsibleError
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.doc_fragments import constructed, inventory_cache

from ansible_collections.agentfleet.metal.plugins.inventory import microvms

HOSTS = """
metal:
  hosts:
    metal1: {ansible_port: 2222, site: north}
    metal2: {}
    metal3: {}
  vars:
    ansible_user: fleet
    ansible_become: true
"""


def vm(name: str, **facts: t.Any) -> dict[str, t.Any]:
    return {
        "name": name, "state": "running", "tenant": "blue", "image": "agent", "image_digest": "ab" * 32, "cid": 50,
        "address": "10.88.0.2", "addresses": ["10.88.0.2"], "memory_bytes": 1 << 28, "ready": True, "agent": {"x": 1}, **facts,
    }  # fmt: skip


ANSWERS: dict[str, t.Any] = {
    "metal1": {"instances": [vm("agent1"), vm("agent2", tenant="red", state="stopped", ready=False)]},
    "metal2": {"instances": [vm("agent1"), vm("worker", image="", address="")]},
    "metal3": {"unreachable": True, "msg": "No route to host"},
}


class Asked:
    """Stands for the run of ``ansible`` that asks the hosts."""

    def __init__(self, answers: dict[str, t.Any]) -> None:
        self.calls: list[list[str]] = []
        report = {"plays": [{"tasks": [{"hosts": answers}]}]}
        self.stdout = "callback that talks first\n" + json.dumps(report, indent=4) + "\nand afterwards\n"
        self.stderr = ""

    def run(self, command: list[str], **options: t.Any) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        assert options["stdin"] == subprocess.DEVNULL and options["timeout"] > 0
        return subprocess.CompletedProcess(command, 0, self.stdout, self.stderr)


@pytest.fixture
def parse(tmp_path: t.Any, monkeypatch: t.Any) -> t.Any:
    """A function that parses the hosts and then the plugin's file; returns the inventory."""
    options: dict[str, t.Any] = {}
    texts = (x.ModuleDocFragment.DOCUMENTATION for x in (constructed, inventory_cache))
    for text in (*texts, microvms.DOCUMENTATION):
        options.update(yaml.safe_load(text)["options"])
    constants.config.initialize_plugin_configuration_definitions("inventory", microvms.InventoryModule.NAME, options)
    (tmp_path / "hosts.yml").write_text(HOSTS)
    monkeypatch.setattr(microvms, "AnsibleCollectionConfig", SimpleNamespace(collection_paths=["/collections"]))
    warned: list[str] = []

    def parse(answers: dict[str, t.Any] | None = None, **config: t.Any) -> t.Any:
        path = tmp_path / "microvms.yml"
        path.write_text(yaml.safe_dump({"plugin": microvms.InventoryModule.NAME, **config}))
        asked = Asked(ANSWERS if answers is None else answers)
        monkeypatch.setattr(microvms.subprocess, "run", asked.run)
        loader = DataLoader()
        manager = InventoryManager(loader=loader, sources=[str(tmp_path / "hosts.yml")])
        manager._inventory.processed_sources.append(None)  # as ansible-core 2.21 does, seen on its command line
        plugin = microvms.InventoryModule()
        plugin._load_name = plugin.ansible_name = microvms.InventoryModule.NAME
        monkeypatch.setattr(type(plugin.display), "warning", lambda _self, text, **_options: warned.append(text))
        assert plugin.verify_file(str(path)) and not plugin.verify_file(str(tmp_path / "hosts.yml"))
        plugin.parse(manager._inventory, loader, str(path), cache=True)
        if config.get("cache"):
            plugin.update_cache_if_changed()
        manager._inventory.reconcile_inventory()
        manager.asked, manager.warned = asked, warned
        return manager

    return parse


def groups(manager: t.Any) -> dict[str, list[str]]:
    return {name: sorted(hosts) for name, hosts in manager.get_groups_dict().items() if hosts}


def test_names_groups_and_who_is_not_there(parse: t.Any) -> None:
    manager = parse()
    found = groups(manager)
    assert found["microvms"] == ["agent1@metal1", "agent1@metal2", "agent2", "worker"]
    assert (found["tenant_red"], found["state_stopped"]) == (["agent2"], ["agent2"])
    assert found["image_agent"] == ["agent1@metal1", "agent1@metal2", "agent2"]
    assert found["host_metal2"] == ["agent1@metal2", "worker"] and found["metal"] == ["metal1", "metal2", "metal3"]
    assert len(manager.warned) == 1 and "microVMs of metal3 are not in the inventory: No route" in manager.warned[0]


def test_one_run_asks_all_hosts_as_the_user_would(parse: t.Any, tmp_path: t.Any, monkeypatch: t.Any) -> None:
    cli = {"extra_vars": ("a=b", "c=d"), "remote_user": "me", "private_key_file": None, "vault_ids": ["x@y"]}
    monkeypatch.setattr(microvms.context, "CLIARGS", cli)
    (command,) = parse(hosts="metal:!metal2", forks=7).asked.calls
    assert command[1:] == [
        "-m", "ansible", "adhoc", "metal:!metal2", "--module-name", "agentfleet.metal.microvm_info",
        "--args", '{"agent_timeout_seconds": 5}', "--forks", "7", "--inventory", str(tmp_path / "hosts.yml"),
        "--extra-vars", "a=b", "--extra-vars", "c=d", "--user", "me", "--vault-id", "x@y",
    ]  # fmt: skip


def test_variables_and_the_hosts_connection(parse: t.Any) -> None:
    variables = parse().get_host("agent2").get_vars()
    assert {key: variables[key] for key in ("agentfleet_name", "agentfleet_host", "agentfleet_state")} == {
        "agentfleet_name": "agent2", "agentfleet_host": "metal1", "agentfleet_state": "stopped",
    }  # fmt: skip
    assert variables["ansible_connection"] == "agentfleet.metal.vsock"
    # Looked up when it is needed, and nothing of it that does not belong to the connection.
    assert variables["agentfleet_host_variables"] == {
        "ansible_port": "{{ hostvars['metal1']['ansible_port'] }}",
        "ansible_user": "{{ hostvars['metal1']['ansible_user'] }}",
    }
    assert "agentfleet_agent" not in variables  # what the guest itself says is no variable


def test_constructed_options(parse: t.Any) -> None:
    manager = parse(
        groups={"agents": "agentfleet_image == 'agent' and agentfleet_ready"},
        keyed_groups=[{"key": "agentfleet_tenant", "prefix": "t"}],
        compose={"ansible_connection": "'ssh'", "ansible_host": "agentfleet_address"},
        hostname="agentfleet_host ~ '-' ~ agentfleet_name",
    )  # fmt: skip
    found = groups(manager)
    assert found["agents"] == ["metal1-agent1", "metal2-agent1"] and found["t_red"] == ["metal1-agent2"]
    variables = manager.get_host("metal1-agent1").get_vars()
    assert (variables["ansible_connection"], variables["ansible_host"]) == ("ssh", "10.88.0.2")


def test_the_name_of_a_host_is_not_taken(parse: t.Any) -> None:
    manager = parse({"metal1": {"instances": [vm("metal2")]}})
    assert groups(manager)["microvms"] == ["metal2@metal1"]


@pytest.mark.parametrize(
    "option", [{"hostname": "nothing"}, {"compose": {"x": "nothing"}}, {"groups": {"x": "nothing.y"}}]
)
def test_a_wrong_expression_is_an_error_only_if_strict(parse: t.Any, option: dict[str, t.Any]) -> None:
    assert "agent2" in groups(parse(**option))["microvms"]
    with pytest.raises(AnsibleError, match="nothing"):
        parse(strict=True, **option)


def test_a_cached_answer_asks_nobody_and_still_warns(parse: t.Any, tmp_path: t.Any) -> None:
    cache = {"cache": True, "cache_plugin": "jsonfile", "cache_connection": str(tmp_path / "cache")}
    first = parse(**cache)
    second = parse(answers={}, **cache)
    assert (len(first.asked.calls), len(second.asked.calls)) == (1, 0)
    assert groups(second) == groups(first) and len(second.warned) == 2


def test_what_is_no_answer_is_an_error(parse: t.Any, monkeypatch: t.Any) -> None:
    monkeypatch.setattr(Asked, "run", lambda _s, c, **_o: subprocess.CompletedProcess(c, 1, "", "ERROR! no\nreally"))
    with pytest.raises(AnsibleError, match=r"could not be asked .*ERROR! no \.\.\. really.*Try the same by hand"):
        parse()

    def late(_self: t.Any, command: list[str], **options: t.Any) -> t.NoReturn:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(Asked, "run", late)
    with pytest.raises(AnsibleError, match="did not answer within 3 seconds"):
        parse(timeout_seconds=3)


def test_no_hosts_are_no_microvms(parse: t.Any, monkeypatch: t.Any) -> None:
    text = "[WARNING]: Could not match supplied host pattern, ignoring: nowhere"
    monkeypatch.setattr(Asked, "run", lambda _s, c, **_o: subprocess.CompletedProcess(c, 0, "", text))
    assert "microvms" not in groups(parse(hosts="nowhere"))


def test_forks_are_at_least_one(parse: t.Any) -> None:
    with pytest.raises(AnsibleError, match="forks: 0: too small"):
        parse(forks=0)
