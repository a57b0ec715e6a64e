# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the role mooncake installs, rendered from its own files."""

from __future__ import annotations

import os
import subprocess
import typing as t
from pathlib import Path

import pytest
import yaml

from ansible_collections.agentfleet.metal.tests.unit.role_lab import HERE, rendered

RENDER = """
for case in given["cases"]:
    variables = {**load("defaults/main.yml"), **case, **load("vars/main.yml")}
    found.append(Templar(loader, variables=variables).template(variables["mooncake_home"]))
"""


def wheels(version: str, digest: str) -> dict[str, t.Any]:
    """Variables that name the engine's wheel and one that it needs."""
    name = f"https://store.example/mooncake_transfer_engine_non_cuda-{version}-cp312-cp312-manylinux_2_35_x86_64.whl"
    other = {"src": "/srv/aiohttp-3.9-py3-none-any.whl", "sha256": "0" * 64}
    return {"mooncake_wheels": [{"src": name, "sha256": digest * 64}, other]}


def test_other_wheels_are_another_installation_with_their_own_version() -> None:
    cases = [{}, wheels("0.3.14", "a"), wheels("0.3.14", "A"), wheels("0.3.14", "b"), wheels("0.3.15", "b")]
    unnamed = {"mooncake_wheels": [{"src": "/srv/engine.whl", "sha256": "c" * 64}]}
    usual, first, same, corrected, newer, plain = rendered("mooncake", RENDER, cases=[*cases, unnamed])
    assert usual == "/opt/agentfleet/mooncake-0.3.13.post1", "installations by version stay where they are"
    assert first == same and first.startswith("/opt/agentfleet/mooncake-0.3.14-")
    assert newer.startswith("/opt/agentfleet/mooncake-0.3.15-") and plain.startswith("/opt/agentfleet/mooncake-wheels-")
    assert len({usual, first, corrected, newer, plain}) == 5


def test_the_engine_counts_as_installed_only_when_it_is_on_the_disk(tmp_path: Path) -> None:
    home, programs = tmp_path / "opt/mooncake-1", tmp_path / "bin"
    packed = tmp_path / "site-packages/mooncake/mooncake_master"
    packed.parent.mkdir(parents=True)
    packed.write_text("engine")
    subprocess.run(["tar", "-czf", "packed.tar.gz", "site-packages"], cwd=tmp_path, check=True)
    link, python = home.parent / "mooncake", home / "bin/python"
    scripts = {
        "python3": f"mkdir -p {home}/lib/python3.12/site-packages {home}/bin; printf '#!/bin/sh' > {python}; chmod 0755 {python}",
        "sync": f'test "$1 $2" = "--file-system {home}" && test ! -e {link} && cat {home}/lib/*/*/*/* > {tmp_path}/synced',
    }
    programs.mkdir()
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    tasks = yaml.safe_load((HERE / "roles/mooncake/tasks/install.yml").read_text())
    (task,) = (task for task in tasks if task["name"] == "Make the engine's environment")
    given = {"home": str(home), "archive": str(tmp_path / "packed.tar.gz"), "requirements": ""}
    env = {"PATH": f"{programs}:{os.environ['PATH']}", **given}
    subprocess.run(["sh", "-c", task["ansible.builtin.shell"]["cmd"]], env=env, check=True)
    assert (tmp_path / "synced").read_text() == "engine" and os.readlink(link) == home.name


STRANGERS = """
for name, hosts, members in given["cases"]:
    around = {"inventory_hostname": "kv1", "groups": {"all": list(hosts)}, "hostvars": hosts}
    more = {"mooncake_etcd_members": [{"name": member} for member in members], **name}
    variables = {**load("defaults/main.yml"), **around, **more, **load("vars/main.yml")}
    found.append(Templar(loader, variables=variables).template(variables["mooncake_etcd_strangers"]))
"""


def test_each_member_of_etcd_has_a_host() -> None:
    hosts: dict[str, t.Any] = {"kv1": {}, "kv2": {"mooncake_etcd_name": "second"}}
    full = "kv1.example.com"
    cases = [({}, hosts, ["kv1", "second"]), ({}, hosts, [full, "kv2"]), ({"mooncake_etcd_name": full}, hosts, [full])]
    assert rendered("mooncake", STRANGERS, cases=cases) == [[], [full], []]


SETTINGS = "# Written by us.\nETCD_NAME=kv1\nETCD_DATA_DIR=/var/lib/etcd/agentfleet\nETCD_LISTEN_PEER_URLS=http://10.0.0.1:2380\n"
WHEN = """
for text in given["texts"]:
    variables = {"mooncake_etcd_lacks": {"stdout": text}}
    template = Templar(loader, variables=variables)
    restarts = [task for task in load("tasks/etcd.yml") if task.get("ansible.builtin.systemd_service", {}).get("state") == "restarted"]
    found.append([task.get("throttle", 0) for task in restarts if all(map(template.evaluate_conditional, task["when"]))])
"""


def test_members_of_etcd_that_serve_take_turns_to_restart() -> None:
    texts = ["", "ActiveState", "ETCD_NAME", "ETCD_NAME\nETCD_DATA_DIR", "ActiveState\nETCD_NAME"]
    assert rendered("mooncake", WHEN, texts=texts) == [[], [], [1], [0], [0]]


@pytest.mark.parametrize(
    ("runs", "active", "lacks"),
    [
        ({}, True, ""),
        ({"ETCD_LISTEN_PEER_URLS": "http://10.0.0.9:2380"}, True, "ETCD_LISTEN_PEER_URLS\n"),
        ({"ETCD_NAME": "kv10", "ETCD_DATA_DIR": "/var/lib/etcd/default"}, True, "ETCD_NAME\nETCD_DATA_DIR\n"),
        ({"ETCD_NAME": "kv10"}, False, "ActiveState\nETCD_NAME\n"),
        ({}, False, "ActiveState\n"),
        (None, False, ""),
    ],
)
def test_settings_are_those_that_etcd_was_started_with(
    tmp_path: Path, runs: dict[str, str] | None, active: bool, lacks: str
) -> None:
    has = dict(line.split("=", 1) for line in SETTINGS.splitlines()[1:])
    with subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"], **has, **(runs or {})}) as etcd:
        pid = 0 if runs is None else etcd.pid
        systemctl = tmp_path / "systemctl"
        state = "active" if active else "activating"
        systemctl.write_text(f"#!/bin/sh\ncase $2 in *=MainPID) echo {pid} ;; *) echo {state} ;; esac\n")
        systemctl.chmod(0o755)
        tasks = yaml.safe_load((HERE / "roles/mooncake/tasks/etcd.yml").read_text())
        (command,) = (task["ansible.builtin.shell"]["cmd"] for task in tasks if "ansible.builtin.shell" in task)
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", "-c", command], input=SETTINGS, env={"PATH": path}, capture_output=True, text=True, check=True
        )
        etcd.kill()
    assert done.stdout == lacks


def test_members_of_etcd_are_named_as_urls_name_them() -> None:
    script = """
for case in given["cases"]:
    variables = {**load("defaults/main.yml"), **case, **load("vars/main.yml")}
    text = open(f"{role}/templates/etcd.env.j2").read()
    found.append(Templar(loader, variables=variables).template(trust_as_template(text)))
"""
    cases = [
        {
            "mooncake_etcd_name": "m1",
            "mooncake_etcd_members": [{"name": "m1", "address": first}, {"name": "m2", "address": "h2"}],
        }
        for first in ("10.0.0.1", "fd00::1", "[fd00::1]")
    ]
    start = "from ansible.template import trust_as_template\n"
    for text, url in zip(rendered("mooncake", start + script, cases=cases), ("10.0.0.1", "[fd00::1]", "[fd00::1]")):
        assert f"ETCD_INITIAL_CLUSTER=m1=http://{url}:2380,m2=http://h2:2380\n" in text
        assert text.count(f"=http://{url}:2379\n") == 2 and text.count(f"=http://{url}:2380\n") == 2
