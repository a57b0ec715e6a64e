# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Inventory plugin microvms: see DOCUMENTATION."""

from __future__ import annotations

DOCUMENTATION = r"""
name: microvms
short_description: The microVMs of the inventory's hosts
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Adds the microVMs of hosts that earlier sources of the inventory brought, as hosts that tasks reach over vsock
    (P(agentfleet.metal.vsock#connection)). Give it after the sources of the hosts, or in the same directory with a file name that
    sorts after theirs.
  - Asks all hosts at the same time, each with one call of M(agentfleet.metal.microvm_info) over its own connection, which needs root
    there (C(ansible_become)). This is one run of C(ansible) with the same sources, configuration, extra variables and user; what is
    asked for on the terminal (passwords) it cannot know.
  - A host that cannot be asked is warned about, and the others are there. With O(cache) the answers are kept, and no host is asked.
  - The file's name must end with C(microvms.yml) or C(microvms.yaml).
  - All microVMs are in the group C(microvms), and in C(tenant_NAME), C(image_NAME), C(state_STATE) and C(host_HOST).
  - A microVM has the name that it has on its host, or C(NAME@HOST) where another host of the inventory has that name.
extends_documentation_fragment:
  - constructed
  - inventory_cache
notes:
  - The variables of a microVM are C(agentfleet_name), C(agentfleet_host), C(agentfleet_state), C(agentfleet_tenant),
    C(agentfleet_image), C(agentfleet_image_digest), C(agentfleet_address) (the first, or empty), C(agentfleet_addresses),
    C(agentfleet_cid), C(agentfleet_memory_bytes) and C(agentfleet_ready) (whether its agent answered).
options:
  plugin:
    description: Marks the file as this plugin's.
    type: str
    required: true
    choices: [agentfleet.metal.microvms]
  hosts:
    description: Pattern of the hosts that are asked.
    type: str
    default: metal
  hostname:
    description: Expression for the inventory name of a microVM, of its variables. By default C(agentfleet_name).
    type: str
  forks:
    description: How many hosts are asked at the same time.
    type: int
    default: 20
  timeout_seconds:
    description: How long all answers together may take.
    type: int
    default: 300
  agent_timeout_seconds:
    description: How long a host waits for the agents in its microVMs, which decides about C(agentfleet_ready).
    type: int
    default: 5
"""

EXAMPLES = r"""
---
# inventories/microvms.yml: ansible -i inventories/example -i inventories/microvms.yml agents -m ping
plugin: agentfleet.metal.microvms
groups:
  agents: agentfleet_image == "agent" and agentfleet_state == "running"
---
# Kept for ten minutes; over the network in place of vsock; groups of one's own
plugin: agentfleet.metal.microvms
hosts: rack1
cache: true
cache_plugin: ansible.builtin.jsonfile
cache_connection: ~/.cache/agentfleet/inventory
cache_timeout: 600
hostname: agentfleet_host ~ "-" ~ agentfleet_name
compose:
  ansible_connection: "'ssh'"
  ansible_host: agentfleet_address
keyed_groups:
  - {key: agentfleet_host.split(".") | first, prefix: rack}
"""

import json
import os
import subprocess
import sys
from collections import Counter

from ansible import constants as C
from ansible import context
from ansible.errors import AnsibleParserError
from ansible.inventory.helpers import get_group_vars
from ansible.plugins.inventory import BaseInventoryPlugin, Cacheable, Constructable
from ansible.plugins.loader import connection_loader
from ansible.template import trust_as_template
from ansible.utils.collection_loader import AnsibleCollectionConfig
from ansible.utils.vars import combine_vars
from ansible.vars.plugins import get_vars_from_inventory_sources

GROUPS = ("tenant", "image", "state", "host")
# What of microvm_info becomes a variable, and what is there in case a host's answer has it not.
FACTS = {
    "name": "", "state": "", "tenant": "", "image": "", "image_digest": "", "address": "", "addresses": [], "cid": None,
    "memory_bytes": 0, "ready": False,
}  # fmt: skip
# Options of the command line that say how hosts are reached.
PASSED_ON = {
    "extra_vars": "--extra-vars", "remote_user": "--user", "private_key_file": "--private-key", "timeout": "--timeout",
    "connection": "--connection", "ssh_common_args": "--ssh-common-args", "ssh_extra_args": "--ssh-extra-args",
    "vault_ids": "--vault-id", "vault_password_files": "--vault-password-file",
}  # fmt: skip


class InventoryModule(BaseInventoryPlugin, Constructable, Cacheable):
    """The microVMs of the inventory's hosts."""

    NAME = "agentfleet.metal.microvms"

    def verify_file(self, path):
        """Whether the file's name is one of ours."""
        return super().verify_file(path) and path.endswith(("microvms.yml", "microvms.yaml"))

    def parse(self, inventory, loader, path, cache=True):
        """Add the microVMs to the inventory."""
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        for option in ("forks", "timeout_seconds", "agent_timeout_seconds"):
            if self.get_option(option) < 1:
                raise AnsibleParserError(f"{path}: {option}: {self.get_option(option)!r}: too small. Give at least 1")
        self.load_cache_plugin()
        key, kept = self.get_cache_key(path), None
        if self.get_option("cache") and cache:
            kept = self._cache.get(key)
        if kept is None:
            kept = self.ask()
            if self.get_option("cache"):
                self._cache[key] = kept
        for host, why in sorted(kept["failed"].items()):
            self.display.warning(f"{path}: the microVMs of {host} are not in the inventory: {why}")
        self.populate(kept["microvms"])

    # -- asking --------------------------------------------------------------

    def ask(self):
        """What the hosts say: ``microvms`` (host -> list), and ``failed`` (host -> why)."""
        # ansible-core 2.21 leaves None among them for what came from no source.
        sources = list(dict.fromkeys(filter(None, self.inventory.processed_sources)))
        if not sources:
            self.display.warning("no source of the inventory came before this one: give it after those of the hosts")
            return {"microvms": {}, "failed": {}}
        arguments = {"agent_timeout_seconds": self.get_option("agent_timeout_seconds")}
        command = [
            sys.executable, "-m", "ansible", "adhoc", self.get_option("hosts"), "--module-name", "agentfleet.metal.microvm_info",
            "--args", json.dumps(arguments), "--forks", str(self.get_option("forks")),
            *(word for source in sources for word in ("--inventory", source)), *self.passed_on(),
        ]  # fmt: skip
        environment = {
            **os.environ,
            "ANSIBLE_LOAD_CALLBACK_PLUGINS": "1",
            "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
            "ANSIBLE_CALLBACKS_ENABLED": "ansible.builtin.minimal",  # none besides; empty is no value
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_FORCE_COLOR": "0",
            "ANSIBLE_VERBOSITY": "0",
            "ANSIBLE_COLLECTIONS_PATH": os.pathsep.join(AnsibleCollectionConfig.collection_paths),
        }
        if C.CONFIG_FILE:
            environment["ANSIBLE_CONFIG"] = C.CONFIG_FILE
        seconds = self.get_option("timeout_seconds")
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, env=environment, check=False
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise AnsibleParserError(
                f"the hosts did not answer within {seconds} seconds. Raise timeout_seconds or forks, or ask fewer hosts"
            ) from None
        return self.answers(done)

    def answers(self, done):
        """What a run of microvm_info printed."""
        start = done.stdout.find("{\n")
        if start < 0:
            if "No hosts matched" in done.stderr or "Could not match" in done.stderr:
                return {"microvms": {}, "failed": {}}
            told = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
            raise AnsibleParserError(
                f"the hosts could not be asked for their microVMs: {told[0]} ... {told[-1]}. Try the same by hand: "
                f"ansible {self.get_option('hosts')} -m agentfleet.metal.microvm_info"
            )
        report, _end = json.JSONDecoder().raw_decode(done.stdout, start)
        found, failed = {}, {}
        for play in report["plays"]:
            for task in play["tasks"]:
                for host, result in task["hosts"].items():
                    if result.get("unreachable") or result.get("failed") or "instances" not in result:
                        failed[host] = str(result.get("msg", "no answer")).strip()
                    else:
                        found[host] = [
                            {fact: one.get(fact, FACTS[fact]) for fact in FACTS} for one in result["instances"]
                        ]
        return {"microvms": found, "failed": failed}

    @staticmethod
    def passed_on():
        """The command line's options that say how hosts are reached, for another one."""
        words = []
        for name, option in PASSED_ON.items():
            values = context.CLIARGS.get(name) or ()
            for value in values if isinstance(values, (list, tuple)) else [values]:
                words += [option, str(value)]
        return words

    # -- adding --------------------------------------------------------------

    def populate(self, microvms):
        """Add all, with variables and groups."""
        named, present = [], set(self.inventory.hosts)
        self.inventory.add_group("microvms")
        for host in sorted(microvms):
            if host not in present:
                continue  # of an older cache
            reach = self.reach(host)
            for one in microvms[host]:
                variables = {f"agentfleet_{fact}": value for fact, value in one.items()}
                variables["agentfleet_host"] = host
                named.append((str(self.named(variables)), variables, reach))
        times = Counter(name for name, _variables, _reach in named)
        for name, variables, reach in named:
            unique = name if times[name] == 1 and name not in present else f"{name}@{variables['agentfleet_host']}"
            self.add(unique, variables, reach)

    def named(self, variables):
        """The inventory name of a microVM."""
        if self.get_option("hostname") is None:
            return variables["agentfleet_name"]
        try:
            return self._compose(self.get_option("hostname"), variables)
        except Exception as error:
            if self.get_option("strict"):
                raise AnsibleParserError(
                    f"hostname: {self.get_option('hostname')!r}: {error}. Use the microVM's variables, such as agentfleet_name"
                ) from error
            return variables["agentfleet_name"]

    def add(self, name, variables, reach):
        """One microVM."""
        self.inventory.add_host(name, group="microvms")
        for variable, value in {**variables, **reach}.items():
            self.inventory.set_variable(name, variable, value)
        for key in GROUPS:
            if variables[f"agentfleet_{key}"]:
                group = self._sanitize_group_name(f"{key}_{variables[f'agentfleet_{key}']}")
                self.inventory.add_child(self.inventory.add_group(group), name)
        strict = self.get_option("strict")
        self._set_composite_vars(self.get_option("compose"), variables, name, strict=strict)
        self._add_host_to_composed_groups(self.get_option("groups"), variables, name, strict=strict)
        self._add_host_to_keyed_groups(self.get_option("keyed_groups"), variables, name, strict=strict)

    def reach(self, host):
        """The variables of the connection to all microVMs of a host: its own, looked up when a task needs them."""
        one, sources = self.inventory.hosts[host], self.inventory.processed_sources
        have = combine_vars(
            combine_vars(get_group_vars(one.get_groups()), get_vars_from_inventory_sources(self.loader, sources, one.get_groups(), "all")),
            combine_vars(one.get_vars(), get_vars_from_inventory_sources(self.loader, sources, [one], "all")),
        )  # fmt: skip
        names = {"ansible_connection"}
        for connection in sorted({"ssh", str(have.get("ansible_connection", "ssh"))}):  # which may be a template
            if connection_loader.get(connection, class_only=True):  # makes its variables known
                names |= set(C.config.get_plugin_vars("connection", connection))
        names &= set(have)
        return {
            "ansible_connection": "agentfleet.metal.vsock",
            "ansible_python_interpreter": "/usr/bin/python3",
            "agentfleet_host_variables": {
                name: trust_as_template(f"{{{{ hostvars[{host!r}][{name!r}] }}}}")
                for name in sorted(names - {"inventory_hostname"})
            },
        }
