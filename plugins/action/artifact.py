# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The controller's part of module artifact: brings files that are its own, and only where they are missing."""

from __future__ import annotations

import os
import typing as t

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ansible_collections.agentfleet.metal.plugins.module_utils._artifact import shown
from ansible_collections.agentfleet.metal.plugins.module_utils._host import sha256_of


class ActionModule(ActionBase):
    """Asks the host first, so that a host that has the release gets no file."""

    TRANSFERS_FILES = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Run the module; before it, transfer what it lacks."""
        result = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        wanted = arguments.get("from_controller", False)
        if not (wanted is True or str(wanted).lower() in ("true", "yes", "1", "on")):
            return {**result, **self._execute_module(task_vars=task_vars)}
        check = self._task.check_mode
        self._task.check_mode = True
        try:
            asked = self._execute_module(module_args=arguments, task_vars=task_vars)
        finally:
            self._task.check_mode = check
        if check or asked.get("failed") or asked.get("unreachable") or not asked.get("changed"):
            return {**result, **asked}
        directory = self._make_tmp_path()
        try:
            brought = []
            for number, source in enumerate(arguments["sources"]):
                local = self._verified(f"sources[{number}]", source)
                remote = self._connection._shell.join_path(directory, f"{number}-{os.path.basename(local)}")
                self._transfer_file(local, remote)
                brought.append({**source, "src": remote})
            self._fixup_perms2((directory, *(item["src"] for item in brought)), execute=False)
            arguments.update(sources=brought, from_controller=False)
            done = self._execute_module(module_args=arguments, task_vars=task_vars)
        finally:
            self._remove_tmp_path(directory)
        return {**result, **done}

    @staticmethod
    def _verified(option: str, source: dict[str, t.Any]) -> str:
        """A file of the controller whose digest is the pinned one."""
        path = os.path.expanduser(str(source["src"]))
        try:
            found = sha256_of(path)
        except OSError as error:
            raise AnsibleActionFail(
                f"{option}.src: '{shown(path)}': {error.strerror} on the controller. Correct the path"
            ) from error
        if found != str(source["sha256"]).lower():
            raise AnsibleActionFail(
                f"{option}.sha256: '{source['sha256']}': checksum mismatch: {path} has {found}. "
                "Fetch the file again, or give the digest of this one if you trust it"
            )
        return path
