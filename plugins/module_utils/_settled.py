# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a host is as declared already, for several resources at once: what a no-change run needs to know.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import (
    _cmdline,
    _cxl,
    _dax,
    _sriov,
    _tiering,
    _tunables,
    _vfio,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Looking, Refused

# Module -> (its options, its class), in the order in which the roles call them.
RESOURCES: dict[str, tuple[dict[str, t.Any], t.Callable[[Host, dict[str, t.Any]], t.Any]]] = {
    "kernel_tunables": (_tunables.OPTIONS, _tunables.Tunables),
    "kernel_cmdline": (_cmdline.OPTIONS, _cmdline.KernelCmdline),
    "cxl_region": (_cxl.OPTIONS, _cxl.CxlRegions),
    "dax_device": (_dax.OPTIONS, _dax.DaxDevices),
    "memory_tiering": (_tiering.OPTIONS, _tiering.MemoryTiering),
    "sriov_vfs": (_sriov.OPTIONS, _sriov.SriovVfs),
    "vfio_bind": (_vfio.OPTIONS, _vfio.VfioBindings),
}


class Settled(Looking):
    """A resource that changes nothing: it asks others for their plans.

    :param declared: module -> its options, complete with defaults
    """

    def __init__(self, host: Host, declared: t.Mapping[str, dict[str, t.Any]]) -> None:
        self.host = host
        self.declared = declared

    def observe(self) -> list[str]:
        """The modules that would do or say something."""
        return [name for name in RESOURCES if name in self.declared and not self._quiet(name)]

    def _quiet(self, name: str) -> bool:
        try:
            resource = RESOURCES[name][1](self.host, self.declared[name])
            observed = resource.observe()
            if resource.plan(observed):
                return False
            result = resource.result(observed)
        except (Refused, HostError, OSError):
            return False  # the module itself will say it, as its own failure
        return not result.get("reboot_required") and not result.get("warnings")

    def result(self, observed: list[str]) -> dict[str, t.Any]:
        """Whether all is as declared, and what is not."""
        return {"settled": not observed, "pending": observed}
