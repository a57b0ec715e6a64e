# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What microVMs a host has, and how they are: declared, running, answering.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

import json
import typing as t
from concurrent.futures import ThreadPoolExecutor

from ansible_collections.agentfleet.metal.plugins.module_utils import _vmm
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_exec import exchange
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import HOME, running_spec, unit
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError
from ansible_collections.agentfleet.metal.plugins.module_utils._systemd import show

T = t.TypeVar("T")
CONSOLE_LINES = 60
AT_MOST = 16  # questions at the same time
# When a VMM ends, or tells nonsense, as one that its guest has taken over can.
NO_STATE = (OSError, HostError, ValueError, LookupError, TypeError, AttributeError)


def _spec(host: Host, path: str) -> _vmm.Spec | None:
    try:
        return t.cast("_vmm.Spec", json.loads(host.read(path)))
    except ValueError:
        return None


def declared(host: Host) -> dict[str, _vmm.Spec]:
    """Name -> spec of every microVM on the host."""
    found = {name: _spec(host, f"{HOME}/{name}/spec.json") for name in host.names(HOME)}
    return {name: spec for name, spec in found.items() if spec}


def running(host: Host, names: t.Iterable[str]) -> dict[str, _vmm.Spec]:
    """Name -> what each running microVM has now, which may differ from what is declared."""
    found = {name: _spec(host, running_spec(name)) for name in names}
    return {name: spec for name, spec in found.items() if spec}


def unit_states(host: Host, names: t.Sequence[str]) -> dict[str, dict[str, t.Any]]:
    """Name -> active state, why it failed, main pid and restarts, with one command for all.

    Asked by pattern, systemd tells of the units in its memory, which are all that run or failed. Asked by name, it
    would first read the files of every stopped one, each time: half a minute for a hundred of them on a slow host.
    """
    found = show(host, [unit("*")] if names else [], "ActiveState,Result,MainPID,NRestarts")
    stopped = {"ActiveState": "inactive", "Result": "success", "MainPID": "0", "NRestarts": "0"}
    return {
        name: {
            "active": state["ActiveState"],
            "result": state["Result"],
            "pid": int(state["MainPID"]),
            "restarts": int(state["NRestarts"]),
        }
        for name in names
        for state in [found.get(unit(name), stopped)]
    }


def console(host: Host, name: str) -> str:
    """The end of a microVM's console, with what its VMM itself said, or why there is none; its unit's journal has both."""
    journal = ["journalctl", f"--unit={unit(name)}", f"--lines={CONSOLE_LINES}", "--output=cat", "--quiet"]
    done = host.run(journal, check=False)
    return done.stdout if done.rc == 0 else f"(no console: {done.text})"


def public_state(state: t.Mapping[str, t.Any] | None) -> str:
    """A unit's state in our words; whether the machine in it is paused is not the unit's to know."""
    words = {"active": "running", "activating": "starting", "deactivating": "stopping", "failed": "failed"}
    return words.get((state or {}).get("active", ""), "stopped")


def together(call: t.Callable[[str], T], names: t.Sequence[str], at_most: int = AT_MOST) -> dict[str, T]:
    """Name -> what the call returns for it, several at the same time: each waits for somebody else."""
    if not names:
        return {}
    with ThreadPoolExecutor(max_workers=min(at_most, len(names))) as pool:
        return dict(zip(names, pool.map(call, names)))


def paused(host: Host, specs: t.Mapping[str, _vmm.Spec]) -> set[str]:
    """Those of the running microVMs whose CPUs stand still."""

    def state(name: str) -> str:
        try:
            with _vmm.driver(specs[name]["driver"]).machine(host, specs[name]) as machine:
                return machine.state()
        except NO_STATE:
            return ""

    return {name for name, found in together(state, list(specs)).items() if found == "paused"}


def ask_agent(
    host: Host, spec: _vmm.Spec, timeout_seconds: float = 5, path: str = "/", message: t.Any = None
) -> dict[str, t.Any] | None:
    """What the agent in a microVM answers over vsock; None when it does not.

    :param timeout_seconds: to reach it, and then for its whole answer
    :param message: sent as the body of a POST request
    """
    body = b"" if message is None else json.dumps(message).encode()
    request = f"{'GET' if message is None else 'POST'} {path} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
    try:
        with _vmm.driver(spec["driver"]).connect(host, spec, _vmm.AGENT_PORT, timeout_seconds) as connection:
            answer = exchange(connection, request.encode() + body, timeout_seconds)
        told = json.loads(answer.partition(b"\r\n\r\n")[2])
    except (OSError, ValueError, RecursionError):  # the last is of a hundred thousand brackets
        return None
    return told if isinstance(told, dict) else None
