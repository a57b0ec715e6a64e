#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Everything the roles need to know about a host, in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_facts
short_description: Collect a host's kernel, memory, CXL, PCI and virtualization facts in one call
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Reads sysfs, procfs and the package database and returns them as C(ansible_facts.metal).
  - It starts no program on Debian hosts and only C(rpm) on others.
  - What cannot be read is absent or empty and never an error.
extends_documentation_fragment:
  - agentfleet.metal.attributes.info
"""

EXAMPLES = r"""
- name: Collect the facts
  agentfleet.metal.host_facts:

- name: Show the memory tiers
  ansible.builtin.debug:
    var: ansible_facts.metal.numa.tiers
"""

RETURN = r"""
ansible_facts:
  description: The facts, under the key C(metal).
  returned: always
  type: dict
  contains:
    metal:
      description: All facts of this collection.
      type: dict
      returned: always
      contains:
        os:
          description: >-
            C(id), C(version_id), C(family) (V(debian), V(redhat), V(openeuler) or empty), C(architecture), C(python),
            C(container), C(cgroup_v2), C(memory_bytes) and C(free_bytes) by path.
          type: dict
          returned: always
        kernel:
          description: >-
            C(release), C(config) (only the options that a feature set asks for), C(cmdline), C(parameters),
            C(modules), C(boot_id), C(sysctl), C(lockdown), C(secure_boot) and C(boot_guard) with its C(phase) and
            what is C(booted).
          type: dict
          returned: always
        packages:
          description: Installed packages and their versions.
          type: dict
          returned: always
        numa:
          description: NUMA nodes, memory tiers, auto-online policy, block size, demotion and interleave weights.
          type: dict
          returned: always
        cxl:
          description: CXL memory devices, root decoders, regions, dax devices and soft-reserved ranges.
          type: dict
          returned: always
        pci:
          description: PCI functions with driver, IOMMU group, SR-IOV and what would be lost with them.
          type: dict
          returned: always
        iommu:
          description: Whether an IOMMU is at work, its kind, its groups, and whether iommufd exists.
          type: dict
          returned: always
        kvm:
          description: C(present), C(usable), C(nested) and the CPU's C(extension).
          type: dict
          returned: always
        rdma:
          description: RDMA devices with their ports.
          type: dict
          returned: always
        ub:
          description: Whether the firmware has UnifiedBus, and its devices.
          type: dict
          returned: always
        audit:
          description: The last runs that changed the host, each with C(time), C(module), C(steps) and maybe C(failed).
          type: list
          returned: always
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils import _audit, _cxl, _kernel, _numa, _pci
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host


def collect(host):
    """All facts of a host."""
    return {
        "os": _kernel.observe_os(host),
        "kernel": _kernel.observe_kernel(host),
        "packages": _kernel.observe_packages(host),
        "numa": _numa.observe_numa(host),
        "cxl": _cxl.observe_cxl(host),
        "pci": _pci.observe_pci(host),
        "iommu": _pci.observe_iommu(host),
        "kvm": _kernel.observe_kvm(host),
        "rdma": _kernel.observe_rdma(host),
        "ub": _kernel.observe_ub(host),
        "audit": _audit.tail(host.read(_audit.LOG)),
    }


def main():
    """Collect the facts."""
    module = AnsibleModule(argument_spec={}, supports_check_mode=True)
    module.exit_json(changed=False, ansible_facts={"metal": collect(Host())})


if __name__ == "__main__":
    main()
