# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Connection plugin vsock: see DOCUMENTATION."""

from __future__ import annotations

DOCUMENTATION = r"""
name: vsock
short_description: Run tasks in a microVM over vsock, through its host
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Reaches a microVM of M(agentfleet.metal.microvm) that has no network. The host is reached by its own connection (ssh or any
    other); from there C(microvm-exec), which comes with the microVMs, goes on over vsock to the agent's part in the image that runs
    commands. It works with privilege escalation, pipelining, asynchronous tasks and files of any size.
  - The inventory plugin P(agentfleet.metal.microvms#inventory) sets all the variables. To write them by hand, see the example.
  - Only root on the host can run commands in its microVMs. A connecting user who is not root needs C(sudo) without a password for
    C(/usr/local/lib/agentfleet/microvm-exec).
  - Modules need the image's Python to be complete, as in Debian's C(python3). The C(raw) module works with any.
extends_documentation_fragment:
  - connection_pipelining
options:
  host:
    description: Inventory name of the host that the microVM is on.
    type: str
    required: true
    vars:
      - name: agentfleet_host
  host_variables:
    description:
      - Variables by which the host is reached, such as C(ansible_host), C(ansible_port), C(ansible_user) and
        C(ansible_ssh_private_key_file); C(ansible_connection) names the connection, C(ssh) by default.
    type: dict
    default: {}
    vars:
      - name: agentfleet_host_variables
  microvm:
    description: Name of the microVM on its host.
    type: str
    default: inventory_hostname
    vars:
      - name: inventory_hostname
      - name: agentfleet_name
  remote_user:
    description: User of the microVM that commands run as. The image must have it.
    type: str
    default: root
    vars:
      - name: ansible_vsock_user
  timeout:
    description: Seconds to wait for a microVM that boots.
    type: int
    default: 10
    env:
      - name: ANSIBLE_TIMEOUT
    ini:
      - section: defaults
        key: timeout
    vars:
      - name: ansible_vsock_timeout
    cli:
      - name: timeout
"""

EXAMPLES = r"""
# An inventory without the inventory plugin: the microVM agent1 of the host metal1.
microvms:
  hosts:
    agent1:
  vars:
    ansible_connection: agentfleet.metal.vsock
    ansible_python_interpreter: /usr/bin/python3
    agentfleet_host: metal1
    agentfleet_host_variables:
      ansible_host: "{{ hostvars[agentfleet_host].ansible_host }}"
      ansible_user: "{{ hostvars[agentfleet_host].ansible_user }}"
"""

import os
import shlex

from ansible.errors import AnsibleConnectionFailure, AnsibleError, AnsibleFileNotFound
from ansible.plugins.connection import ConnectionBase, ensure_connect
from ansible.plugins.loader import connection_loader
from ansible.utils.display import Display

from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_exec import NOT_REACHED, REAL_255
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import LIBRARY

PROGRAM = f"{LIBRARY}/microvm-exec"
CHUNK = 8 << 20  # of a file; each is one command
display = Display()


class Connection(ConnectionBase):
    """The host's own connection, with each command wrapped."""

    transport = "agentfleet.metal.vsock"
    has_pipelining = True

    def __init__(self, play_context, *args, **kwargs):
        super().__init__(play_context, *args, **kwargs)
        self._kwargs = {key: value for key, value in kwargs.items() if key != "shell"}
        self._through = None

    def _connect(self):
        """Make the host's connection; it connects with its first command."""
        variables = {
            "inventory_hostname": self.get_option("host"),
            "ansible_host": self.get_option("host"),
            **self.get_option("host_variables"),
        }
        name = variables.get("ansible_connection", "ssh")
        self._through = connection_loader.get(name, self._play_context.copy(), **self._kwargs)
        if self._through is None or isinstance(self._through, type(self)):
            raise AnsibleError(
                f"agentfleet_host_variables.ansible_connection: {name!r}: no connection plugin for a host. "
                "Name one such as ssh or local"
            )
        self._through.set_options(var_options=variables)
        if self._through.has_option("use_tty"):  # it would change what goes through
            self._through.set_option("use_tty", False)
        self._connected = True
        return self

    def _wrapped(self, cmd):
        """The command as the host's shell runs it."""
        words = [
            PROGRAM, "--timeout", str(self.get_option("timeout")), "--user", self.get_option("remote_user"),
            self.get_option("microvm"), cmd,
        ]  # fmt: skip
        script = 'root=; [ "$(id -u)" = 0 ] || root="sudo -n --"; exec $root "$@"'
        return shlex.join(["/bin/sh", "-c", script, "sh", *words])

    @ensure_connect
    def exec_command(self, cmd, in_data=None, sudoable=True):
        """Run a command in the microVM."""
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        name, host = self.get_option("microvm"), self.get_option("host")
        display.vvv(f"EXEC IN MICROVM {name}: {cmd}", host=host)
        self._through.set_become_plugin(self.become)  # whose prompts come through
        code, out, err = self._through.exec_command(self._wrapped(cmd), in_data=in_data, sudoable=sudoable)
        if code == NOT_REACHED:  # ssh itself says so
            raise AnsibleConnectionFailure(f"microVM {name} through {host}: {err.decode(errors='replace').strip()}")
        if code == 254 and err.endswith(REAL_255):
            return 255, out, err[: -len(REAL_255)]
        if code == 127 and PROGRAM.encode() in err:
            raise AnsibleConnectionFailure(
                f"{host} has no {PROGRAM}: no microVM of agentfleet.metal was made there. Run the role microvm first"
            )
        return code, out, err

    def _run(self, command, path, in_data=None):
        code, out, err = self.exec_command(command, in_data=in_data, sudoable=False)
        if code != 0:
            raise AnsibleError(
                f"{path} in microVM {self.get_option('microvm')}: {err.decode(errors='replace').strip()}"
            )
        return out

    def put_file(self, in_path, out_path):
        """Write a file of the microVM."""
        super().put_file(in_path, out_path)
        if not os.path.exists(in_path):
            raise AnsibleFileNotFound(f"{in_path}: no such file here")
        target = shlex.quote(out_path)
        self._run(f": >{target}", out_path)
        with open(in_path, "rb") as file:
            while chunk := file.read(CHUNK):
                self._run(f"cat >>{target}", out_path, chunk)

    def fetch_file(self, in_path, out_path):
        """Read a file of the microVM."""
        super().fetch_file(in_path, out_path)
        source = shlex.quote(in_path)
        blocks = CHUNK >> 20
        with open(out_path, "wb") as file:
            chunk, number = b"x", 0
            while chunk:
                chunk = self._run(f"dd if={source} bs=1M skip={number * blocks} count={blocks} status=none", in_path)
                file.write(chunk)
                number += 1

    def reset(self):
        """Close what the host's connection keeps open."""
        if self._through is not None:
            self._through.reset()

    def close(self):
        """End the connection."""
        if self._through is not None:
            self._through.close()
        self._connected = False
