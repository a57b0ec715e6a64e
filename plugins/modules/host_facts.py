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
          description: Installed packages and their versions, from the package database's own files.
          type: dict
          returned: always
        numa:
          description: >-
            C(nodes), each with C(id), C(tier), C(cpus), C(size_bytes), C(free_bytes), C(cache_bytes), C(distances),
            C(hugepages), C(access), C(online_blocks), C(offline_blocks), C(normal_bytes) and C(movable_bytes); C(tiers),
            each with C(tier) and C(nodes), fastest first; C(auto_online), C(block_size_bytes), C(demotion), C(balancing),
            C(promote_rate_limit_mib), C(weighted_interleave) and C(weighted_interleave_auto).
          type: dict
          returned: always
        cxl:
          description: >-
            C(memdevs), each with C(name), C(serial), C(pci_address), C(host_bridge), C(route), C(numa_node), its sizes
            C(ram_bytes), C(pmem_bytes), C(ram_free_bytes), C(pmem_free_bytes) and C(label_bytes), C(firmware) and C(enabled);
            the root C(decoders), each with C(name), C(ram), C(pmem), C(start), C(size_bytes), C(available_bytes),
            C(interleave_ways), C(interleave_granularity), C(targets), C(target_uids), C(qos_class), C(locked) and
            C(firmware_ram_bytes); C(regions), each with C(name), C(decoder), C(type), C(state), C(start), C(size_bytes),
            C(interleave_ways), C(interleave_granularity), C(memdevs) (serials), C(pci_addresses), C(locked), C(access) and
            C(dax); C(dax), each with C(name), C(region), C(namespace_uuid), C(mode), C(size_bytes), C(resource),
            C(target_node), C(align_bytes), C(online_blocks), C(total_blocks), C(zone), C(online) and C(movable);
            C(soft_reserved) ranges; and C(persisted), the concerns that come back at boot.
          type: dict
          returned: always
        pci:
          description: >-
            C(functions), each with C(address), C(vendor), C(device), C(class), C(driver), C(driver_override), C(iommu_group),
            C(numa_node), C(physfn), C(sriov) (C(totalvfs), C(numvfs), C(autoprobe) and C(vfs), if it has them), C(netdevs),
            C(blockdevs), what a rebind would break (C(in_use)), the processes that hold its vfio nodes open (C(users)), and
            whether the running system needs it (C(boot_critical)).
          type: dict
          returned: always
        iommu:
          description: >-
            Whether an IOMMU is at work (C(enabled)), its C(kind), its C(groups) with C(id), C(type) and C(functions), and
            whether C(iommufd) exists.
          type: dict
          returned: always
        kvm:
          description: C(present), C(usable), C(nested) and the CPU's C(extension).
          type: dict
          returned: always
        rdma:
          description: >-
            C(devices), each with C(name), C(node_guid), C(pci_address), C(netdevs), C(numa_node) and C(ports) (C(port),
            C(state), C(link_layer), C(rate)).
          type: dict
          returned: always
        ub:
          description: >-
            Whether the firmware has UnifiedBus (C(present)), and its C(devices) with C(name), C(driver), C(guid), C(type),
            C(vendor), C(device) and C(class_code).
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
