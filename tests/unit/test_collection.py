# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What must agree across the files of the collection."""

from __future__ import annotations

import re
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path.stem for path in ROOT.glob("plugins/modules/[a-z]*.py"))
ROLES = sorted(path.name for path in ROOT.glob("roles/*"))
# Collections that are not part of ansible-core, by the names of their namespaces.
# Names of other collections; `from ansible.utils.x import` is ansible-core's own.
FOREIGN = re.compile(
    r"(?<![\w./-])(?<!from )((?:ansible\.(?!builtin\b|module_utils\b|plugins\b)|community\.|containers\.)[a-z_0-9]+)\.[a-z_]\w+"
)


def load(path: str) -> t.Any:
    """A YAML file of the collection."""
    return yaml.safe_load((ROOT / path).read_text())


def tracked() -> list[Path]:
    """All text files under version control, and new ones that will be."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout.decode()
    ours = [
        name for name in names.split("\0") if name and not name.startswith("tests/output/")
    ]  # ansible-test's reports
    return [ROOT / name for name in ours if (ROOT / name).is_file()]


def documentation(module: str) -> dict[str, t.Any]:
    """The documentation of a module."""
    source = (ROOT / f"plugins/modules/{module}.py").read_text()
    match = re.search(r'^DOCUMENTATION = r?"""(.*?)"""', source, re.DOTALL | re.MULTILINE)
    assert match, f"{module} has no DOCUMENTATION"
    return yaml.safe_load(match.group(1))


@pytest.mark.parametrize("role", ROLES)
def test_defaults_of_a_role_are_those_of_its_spec(role: str) -> None:
    specs = load(f"roles/{role}/meta/argument_specs.yml")["argument_specs"]
    options = {name: option for spec in specs.values() for name, option in spec.get("options", {}).items()}
    defaults = ROOT / f"roles/{role}/defaults/main.yml"
    assert (load(str(defaults)) or {} if defaults.exists() else {}) == {
        name: option["default"] for name, option in options.items() if "default" in option
    }
    assert [name for name in options if not name.startswith(f"{role}_")] == []


def called(tasks: list[dict[str, t.Any]]) -> dict[str, t.Any]:
    """Module of this collection -> the arguments that a role's tasks give to it."""
    found = {}
    for task in tasks:
        found.update(called(task.get("block", [])))
        for key, arguments in task.items():
            if key.startswith("agentfleet.metal."):
                found[key.rpartition(".")[2]] = arguments
    return found


@pytest.mark.parametrize("role", ["kernel", "cxl", "vfio"])
def test_preflight_asks_for_what_a_role_will_do(role: str) -> None:
    variables, tasks = load(f"roles/{role}/vars/main.yml"), called(load(f"roles/{role}/tasks/main.yml"))
    asked = {module: arguments for module, arguments in tasks.items() if module not in ("boot_guard", "memory_tiering")}
    assert asked and asked == {module: variables[f"{role}__{module}"] for module in asked}
    assert [
        module for module in {*asked, *tasks} - {"boot_guard"} if module not in str(variables[f"{role}__declared"])
    ] == []
    if role == "cxl":  # given as it is, each of its keys an option
        given = tasks["memory_tiering"]
        assert given == {option: f"{{{{ cxl_tiering.{option} | default(omit) }}}}" for option in given}
        assert {*given, "persist"} == set(documentation("memory_tiering")["options"])


def test_teardown_takes_back_every_part_of_the_command_line() -> None:
    merged = re.findall(r"\b[a-z]+_cmdline\b", load("roles/kernel/vars/main.yml")["kernel__cmdline"])
    given = load("playbooks/teardown.yml")[-1]["tasks"][-1]["vars"]
    assert merged and [name for name in merged if given.get(name) != {}] == []


def test_action_group_has_all_modules() -> None:
    assert load("meta/runtime.yml")["action_groups"]["metal"] == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_module_is_documented_and_refuses_bad_input(module: str) -> None:
    docs = documentation(module)
    fragments = docs.get("extends_documentation_fragment", [])
    assert any(
        name.startswith("agentfleet.metal.attributes") for name in [fragments, *fragments] if isinstance(name, str)
    )
    assert docs["version_added"]
    if docs.get("options"):
        assert load(f"tests/unit/plugins/modules/bad_inputs/{module}.yml")


def test_every_module_util_is_tested() -> None:
    tests = "\n".join(path.read_text() for path in ROOT.glob("tests/unit/plugins/**/test_*.py"))
    names = [path.stem for path in ROOT.glob("plugins/module_utils/_[a-z]*.py")]
    assert [name for name in names if not re.search(rf"\b{name}\b", tests)] == []


def test_dependencies_are_those_that_are_used() -> None:
    def used(*places: str) -> set[str]:
        return {
            name
            for path in tracked()
            if path.relative_to(ROOT).parts[0] in places
            for name in FOREIGN.findall(path.read_text(errors="replace"))
        }

    assert used("roles", "playbooks", "plugins", "inventories", "ansible.cfg") == set(
        load("galaxy.yml")["dependencies"]
    )
    unpacked = {item["name"] for item in load("requirements/collections.yml")["collections"]}
    assert used("roles", "playbooks", "plugins", "inventories", "benchmarks", "molecule", "ansible.cfg") <= unpacked


@pytest.mark.parametrize(
    ("drivers", "wanted"),
    [([], False), ([None], False), (["qemu", None], False), ([None, "cloud_hypervisor", "qemu"], True)],
)
def test_microvm_playbook_installs_cloud_hypervisor_where_a_driver_asks_for_it(
    drivers: list[str | None], wanted: bool
) -> None:
    (play,) = load("playbooks/microvm.yml")
    names = [role["role"] for role in play["roles"]]
    assert names.index("agentfleet.metal.cloud_hypervisor") < names.index("agentfleet.metal.microvm")
    (condition,) = [role["when"] for role in play["roles"] if role["role"] == "agentfleet.metal.cloud_hypervisor"]
    instances = [{"name": "x", **({"driver": driver} if driver else {})} for driver in drivers]
    templar = Templar(loader=DataLoader(), variables={"microvm_instances": instances})
    assert templar.evaluate_conditional(trust_as_template(condition)) is wanted


def told_by_lab_hosts(pattern: str, message: str, *arguments: str) -> str:
    """What ``ansible -m debug`` says for hosts of the lab's inventory; none of them has to be there."""
    words = [pattern, "-i", str(ROOT / "inventories/lab"), "-m", "ansible.builtin.debug", "-a", f"msg={message}"]
    program = [sys.executable, "-c", "from ansible.cli.adhoc import main; main()"]
    done = subprocess.run([*program, *words, *arguments], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def test_how_to_reach_a_lab_host_can_be_read_through_hostvars() -> None:
    """As the connection to its microVMs does; a variable that is read so cannot use hostvars itself."""
    for arguments, directory in (([], ROOT / "build/lab"), (["-e", "lab_dir=/elsewhere"], "/elsewhere")):
        told = told_by_lab_hosts("localhost", "{{ hostvars.metal1.ansible_ssh_common_args }}", *arguments)
        assert f"UserKnownHostsFile={directory}/metal1/known_hosts" in told


def test_how_to_reach_a_lab_host_is_that_of_the_host_a_task_is_delegated_to() -> None:
    """Where a task is delegated, inventory_hostname stays the name of the host that delegates it."""
    message = "{{ ansible_ssh_common_args }}{{ ansible_ssh_private_key_file }}"
    told = told_by_lab_hosts("lab,lab_threefs", message, "-e", "inventory_hostname=another")
    for host in ("metal1", "metal2", "metal3", "metal4", "metal5"):
        assert f"/{host}/known_hosts" in told and f"/{host}/id_ed25519" in told, told


def test_no_file_names_a_registry_or_a_place_of_one_machine() -> None:
    registry = r"https?://[a-z0-9.-]*\b(?:debian|ubuntu|pypi|pythonhosted|npmjs|crates|docker)\.[a-z]+"
    # where the outermost checkout lies (ansible-test runs a copy below it), unless that is a path like any other
    outermost = [parent for parent in [ROOT, *ROOT.parents] if (parent / "galaxy.yml").exists()][-1]
    forbidden = re.compile(rf"{registry}|{re.escape(str(outermost))}/")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in tracked()
        for line in path.read_text(errors="replace").splitlines()
        if forbidden.search(line)
    ]
    assert found == []
