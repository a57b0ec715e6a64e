#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module microvm: see DOCUMENTATION."""

from __future__ import annotations

DOCUMENTATION = r"""
module: microvm
short_description: Manage microVMs that share one copy of their root file system
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Declares, starts, stops and removes the microVMs of one call, with bounded parallelism. One bad item is refused
    before any is touched.
  - The root is an image of M(agentfleet.metal.image_store), attached as virtio-pmem and mounted with DAX, so that all
    microVMs of one image use one copy in the host's page cache; each has a writable layer of its own in its memory.
    No guest can change the image.
  - systemd supervises them, each as its own unprivileged dynamic user in the slice of its tenant. MicroVMs that run are
    back after a reboot without Ansible.
  - A microVM counts as started when the agent in it has answered over vsock. A first start that fails is undone, with the
    volumes that were made for it, and reported with the console.
extends_documentation_fragment: agentfleet.metal.attributes
options:
  state:
    description:
      - V(present) defines, and leaves running or not as it is.
      - V(running) also starts and waits until each is ready. V(paused) is V(running) with its CPUs standing still.
      - V(stopped) defines and stops by the power button. V(restarted) stops what runs, too, and starts all.
      - V(absent) stops and removes everything that a microVM has on the host but its volumes; only O(instances[].name) and
        O(instances[].count) matter then.
      - What can be changed while a microVM runs (CPUs and memory up to their maximum, balloon, images of data, volumes that
        grow or that the guest does not mount, shares, networks, devices, disk limits) is. What a guest did in part, or did
        not take into use, is its RV(instances[].error), and the next call goes on with it.
    type: str
    choices: [present, running, paused, stopped, restarted, absent]
    default: running
  instances:
    description: The microVMs.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description:
          - Name, also the guest's host name. Of V(a-z), V(0-9) and hyphen; not V(shares), V(slots) or V(snapshots).
          - With O(instances[].count) it has the number in it, as in V(agent-{index}) or V(agent-{index:03d}).
        type: str
        required: true
      count:
        description:
          - How many microVMs this item declares, alike but for their names and what is derived from them.
          - Their numbers begin with 1. A smaller number than before removes none; use O(state=absent) with their names.
        type: int
      driver:
        description:
          - Virtual machine monitor. V(qemu) is the distribution's QEMU, 8.2 or newer.
          - V(cloud_hypervisor) is Cloud Hypervisor of the role P(agentfleet.metal.cloud_hypervisor#role), on hosts with KVM. A
            microVM keeps the version that it was made with.
        type: str
        choices: [qemu, cloud_hypervisor]
        default: qemu
      image:
        description:
          - Name or digest in the host's image store. Needed unless O(state=absent) or O(instances[].from_snapshot) is given.
        type: str
        default: ""
      data_images:
        description:
          - Images beside the root's, such as models and data sets, of O(agentfleet.metal.rootfs_image#module:images[].data) or any
            other. They are mapped read-only in the same way, so that all microVMs of the host use one copy.
          - They come while it runs, where it was started with O(instances[].hotplug_slots); with V(cloud_hypervisor) they also go.
        type: list
        elements: dict
        default: []
        suboptions:
          image:
            description: Name or digest in the host's image store.
            type: str
            required: true
          target:
            description: Mount point in the guest.
            type: str
            required: true
      kernel:
        description:
          - Kernel instead of the image's own. The name or digest of another image of the store, whose kernel and initramfs are
            used, or the path of a kernel on the host that has everything built in and needs no initramfs.
          - A kernel without an initramfs starts images that were built with O(agentfleet.metal.rootfs_image#module:images[].kernel_source).
            An initramfs mounts what is like the image that it was built for, in C(filesystem) and C(dax), and without C(verity).
        type: str
        default: ""
      snapshots:
        description:
          - Whether snapshots can be made of it (M(agentfleet.metal.microvm_snapshot)). Its RAM is then a file below C(/run).
        type: bool
        default: false
      from_snapshot:
        description:
          - Name of a snapshot on the host that each start begins with, instead of booting. What the machine is made of
            (driver, image, CPUs, memory) comes from the snapshot. Its pages are in the host's memory once for all clones.
          - Name, addresses, MACs, machine-id, entropy, clock and O(instances[].environment) are its own before it counts as
            started. It has as many O(instances[].networks) as the microVM that the snapshot is of.
          - All else goes on as it was in that microVM. O(instances[].user_data) must be the same, since a clone does not boot;
            of what a machine is made of (CPUs, memory, image, kernel, volumes, shares, devices, limits of rates) leave out what
            you like, and what you give must be what that microVM had. Otherwise it is refused.
        type: str
        default: ""
      vcpus:
        description: Virtual CPUs.
        type: int
        default: 1
      vcpus_max:
        description: How many O(instances[].vcpus) it can be given while it runs. By default no more.
        type: int
      memory:
        description: Guest memory in whole MiB, such as V(512MiB); at least V(96MiB). By default V(256MiB).
        type: str
      memory_max:
        description:
          - How much O(instances[].memory) it can be given while it runs, in steps of V(128MiB) above it. By default no more.
        type: str
      memory_zones:
        description:
          - Guest memory in parts, instead of O(instances[].memory). Each is a NUMA node of the guest; its CPUs are on the first.
        type: list
        elements: dict
        default: []
        suboptions:
          size:
            description: Size of the zone.
            type: str
            required: true
          numa_node:
            description: NUMA node of the host that it is bound to, such as one of CXL memory. By default where the kernel likes.
            type: int
      numa_node:
        description: NUMA node of the host that all guest memory is bound to. It never comes from another node.
        type: int
      hugepages:
        description: Size of the reserved huge pages of the host that guest memory is made of, V(2MiB) or V(1GiB).
        type: str
      thp:
        description:
          - Whether the host may use transparent huge pages for guest memory. They make a busy guest faster, and let a small one
            take nearly all its memory at once.
        type: bool
        default: false
      balloon:
        description: Part of O(instances[].memory) that the guest leaves to the host. It gets it back rather than run out.
        type: str
      free_page_reporting:
        description: Whether the guest's free memory goes back to the host.
        type: bool
        default: true
      cid:
        description: Vsock address, unique on the host. By default derived from the name.
        type: int
      tenant:
        description: Tenant. Its microVMs run in the slice C(agentfleet-TENANT.slice).
        type: str
        default: default
      autostart:
        description: Whether a running microVM is started again when the host boots.
        type: bool
        default: true
      restart_policy:
        description:
          - What systemd does when the VMM ends, also by the guest's own power off. After five starts in five minutes
            (of one with O(instances[].from_snapshot), in ten minutes) the microVM is V(failed).
          - A guest that powers off is no failure. With QEMU one that panics or reboots is none either, as the process ends in
            the same way; with Cloud Hypervisor it is one. With V(always) all of them come back.
        type: str
        choices: [always, on-failure, never]
        default: always
      environment:
        description:
          - Environment of the agent, on a read-only disk of the microVM. Texts and numbers; C(PATH) comes before the system's.
          - Not for secrets, since plans and diffs show it.
        type: dict
        default: {}
      user_data:
        description:
          - First-boot data, on a second read-only disk of the microVM. The guest applies it once for each content.
          - It is never shown; plans and diffs have a digest of it.
        type: dict
        suboptions:
          files:
            description: Files that the guest gets.
            type: list
            elements: dict
            default: []
            suboptions:
              path:
                description: Path in the guest.
                type: str
                required: true
              content:
                description: Text of the file.
                type: str
                required: true
              mode:
                description: Mode in octal digits.
                type: str
                default: "0600"
          run:
            description:
              - Shell commands that the guest runs once, after the files are there and before its services start.
              - The first that fails ends them. The microVM runs all the same, with a warning, and runs all of them again when it
                starts again.
            type: list
            elements: str
            default: []
      kernel_arguments:
        description: Words added to the guest kernel's command line.
        type: list
        elements: str
        default: []
      hotplug_slots:
        description:
          - How many more volumes, shares, networks, devices and images can be attached while it runs. Without any, attaching and
            removing them needs a restart. Each makes booting a little slower. V(cloud_hypervisor) needs none but for images, where Landlock
            confines it.
        type: int
        default: 0
      volumes:
        description:
          - Disks of the microVM's own, kept as files below C(/var/lib/agentfleet/volumes). They stay when it is stopped, made
            anew or removed, unless O(delete_volumes) is true.
        type: list
        elements: dict
        default: []
        suboptions:
          name:
            description: Name, also the disk's serial number in the guest. At most 20 characters.
            type: str
            required: true
          size:
            description:
              - Size. A larger one than before makes the volume grow, also while the microVM runs, with the file system that its
                guest makes; it never shrinks.
            type: str
            required: true
          template:
            description: File on the host that a new volume begins as. Where the file system can, they share blocks.
            type: str
          readonly:
            description: Whether the guest cannot write it.
            type: bool
            default: false
          mount:
            description:
              - Mount point in the guest, which mounts it when it starts, so that it comes and goes with a restart. Without one,
                the volume can come and go while the microVM runs.
            type: str
          filesystem:
            description: File system that the guest makes on a blank volume that it mounts, and lets grow with it. By default V(ext4).
            type: str
            choices: [ext4, xfs]
          writable_layer:
            description: Whether the guest's root keeps what it writes on this volume, instead of in its memory.
            type: bool
            default: false
      shares:
        description: Directories of the host that the guest sees through virtiofsd.
        type: list
        elements: dict
        default: []
        suboptions:
          tag:
            description: Name of the share, unique in the microVM.
            type: str
            required: true
          source:
            description: Directory on the host.
            type: str
            required: true
          target:
            description: Mount point in the guest. By default C(/mnt/TAG).
            type: str
          readonly:
            description: Whether virtiofsd refuses every write.
            type: bool
            default: true
          cache:
            description:
              - How long the guest may trust what it has read. V(auto) looks again after a second, V(never) each time, V(metadata) keeps
                names and attributes only; V(always) is for directories that nobody changes, and keeps a copy in each guest's memory.
            type: str
            choices: [auto, always, metadata, never]
            default: auto
          dax:
            description:
              - V(always) maps the share into the guest. No driver has it today, so that it is refused; files in an image are
                mapped (pmem with DAX).
            type: str
            choices: [never, always]
            default: never
      networks:
        description: Networks that the microVM is attached to.
        type: list
        elements: dict
        default: []
        suboptions:
          network:
            description: One of O(networks[].name).
            type: str
            required: true
          address:
            description: Address in the network's prefix. By default the first free one, which is kept.
            type: str
          address6:
            description: The same in the network's O(networks[].prefix6).
            type: str
          mac:
            description: MAC of the network device. By default derived from the names of microVM and network.
            type: str
      devices:
        description:
          - PCI functions of the host that the microVM has, as addresses such as V(0000:41:00.0). They are bound to C(vfio-pci)
            (M(agentfleet.metal.vfio_bind)), and all its memory is pinned.
        type: list
        elements: str
        default: []
      rate_limits:
        description: Limits of each volume and each network device.
        type: dict
        suboptions:
          disk_bytes_per_second:
            description: Bytes per second, read and written, such as V(100MiB).
            type: str
          disk_operations_per_second:
            description: Operations per second.
            type: int
          network_bytes_per_second:
            description: Bytes per second, such as V(10MiB). Of V(cloud_hypervisor) only.
            type: str
      resources:
        description: Limits and shares of the VMM's control group.
        type: dict
        suboptions:
          cpu_weight:
            description: Share of CPU time among others, from 1 to 10000; others have 100.
            type: int
          cpu_quota_percent:
            description: Most CPU time, in percent of one CPU.
            type: int
          memory_max:
            description: Most memory, with the VMM itself. By default what guest memory, image and VMM can need.
            type: str
          io_weight:
            description: Share of disk time among others, from 1 to 10000; others have 100.
            type: int
          tasks_max:
            description: Most processes and threads.
            type: int
  networks:
    description:
      - Networks of the host for microVMs. A bridge and its rules in the packet filter exist while a microVM uses it.
      - A microVM can send from its own MAC and addresses only, and reach microVMs of its own tenant on the same network
        only. The host answers it pings and O(networks[].host_services) at the network's first address, and nothing else.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the network.
        type: str
        required: true
      prefix:
        description: IPv4 prefix such as V(10.88.0.0/24). The host has its first address.
        type: str
      prefix6:
        description: IPv6 prefix such as V(fd00:88::/64), alone or beside O(networks[].prefix).
        type: str
      bridge:
        description: Name of the bridge.
        type: str
        default: agentfleet0
      egress:
        description:
          - V(none) is no way out. V(nat) forwards with the host's address, V(routed) with the microVM's own; nobody outside
            can begin a connection. Neither leads to the host itself, to other networks of microVMs, or to link-local
            addresses such as a cloud's metadata service.
          - A host that did not forward before does so for microVMs only.
        type: str
        choices: [none, nat, routed]
        default: none
      egress_allow:
        description: Where O(networks[].egress) leads. Empty is everywhere.
        type: list
        elements: dict
        default: []
        suboptions:
          prefix:
            description: Prefix or address, IPv4 or IPv6.
            type: str
            required: true
          protocol:
            description: Protocol.
            type: str
            choices: [any, tcp, udp, icmp]
            default: any
          ports:
            description: Ports and ranges of them such as V(8000-8099), of V(tcp) or V(udp). Empty is all.
            type: list
            elements: str
            default: []
      host_services:
        description: Services of the host that microVMs may use, at the network's first address.
        type: list
        elements: dict
        default: []
        suboptions:
          port:
            description: Port.
            type: int
            required: true
          protocol:
            description: Protocol.
            type: str
            choices: [tcp, udp]
            default: tcp
  accelerator:
    description: V(auto) is KVM where the CPU has virtualization, and emulation elsewhere.
    type: str
    choices: [auto, kvm, tcg]
    default: auto
  allow_restart:
    description:
      - Whether running microVMs are restarted whose definition changed in a way that cannot be applied while they run.
      - Otherwise a warning names them, and RV(instances[].restart_required) says so.
    type: bool
    default: false
  delete_volumes:
    description: Whether O(state=absent) also deletes the volumes with all their data.
    type: bool
    default: false
  memory_overcommit:
    description:
      - Share of the host's memory that all microVMs together may have; a call that exceeds it is refused. Besides those of the
        call, those that run or start at boot count.
    type: float
    default: 1.0
  parallel:
    description:
      - How many microVMs boot at the same time, also when the host boots, or are changed while they run; 0 is its number of CPUs.
    type: int
    default: 0
  ready_timeout_seconds:
    description: How long to wait for the agent in each microVM.
    type: int
    default: 180
"""

EXAMPLES = r"""
- name: Four agents on one image
  agentfleet.metal.microvm:
    networks:
      - name: agents
        prefix: 10.88.0.0/24
    instances:
      - {name: agent-1, image: agent, networks: [{network: agents}]}
      - {name: agent-2, image: agent, networks: [{network: agents}]}
      - {name: agent-3, image: agent, networks: [{network: agents}]}
      - name: agent-4
        image: agent
        memory: 512MiB
        environment: {ROLE: reviewer}
        networks: [{network: agents, address: 10.88.0.40}]

- name: A network with IPv6, a proxy on the host, and one place outside
  agentfleet.metal.microvm:
    networks:
      - name: reviewers
        bridge: reviewers0
        prefix: 10.89.0.0/24
        prefix6: fd00:89::/64
        host_services: [{port: 3128}]
        egress: nat
        egress_allow:
          - {prefix: 192.0.2.10, protocol: tcp, ports: [443]}
    instances:
      - {name: reviewer-1, image: agent, tenant: reviewers, networks: [{network: reviewers}]}

- name: A hundred alike, each with a disk of its own for what it writes, and room to grow
  agentfleet.metal.microvm:
    instances:
      - name: agent-{index:03d}
        count: 100
        image: agent
        memory: 256MiB
        memory_max: 1GiB
        vcpus_max: 4
        hotplug_slots: 2
        volumes: [{name: root, size: 2GiB, writable_layer: true}]
        user_data:
          files: [{path: /etc/agent/token, content: "{{ vault_agent_token }}"}]
        resources: {cpu_quota_percent: 100, tasks_max: 64}

- name: Cold memory on CXL, a device, and a data disk that shares blocks with its template
  agentfleet.metal.microvm:
    instances:
      - name: trainer
        image: agent
        memory_zones: [{size: 1GiB, numa_node: 0}, {size: 3GiB, numa_node: 2}]
        devices: ["0000:41:00.0"]
        volumes: [{name: data, size: 20GiB, template: /srv/templates/data.ext4, mount: /data}]

- name: Remove one
  agentfleet.metal.microvm:
    state: absent
    instances:
      - name: agent-4
"""

RETURN = r"""
plan:
  description: The steps, with before and after.
  returned: always
  type: list
  elements: dict
instances:
  description: The microVMs of the call, in its order.
  returned: always, also when some of them did not start, pause, resume or change
  type: list
  elements: dict
  contains:
    name:
      description: Name of the microVM.
      type: str
    state:
      description: V(running), V(paused), V(starting), V(stopping), V(stopped), V(failed) or V(absent).
      type: str
    image_digest:
      description: SHA-256 of its image.
      type: str
    cid:
      description: Its vsock address.
      type: int
    addresses:
      description: Its network addresses.
      type: list
      elements: str
    pid:
      description: Process of the VMM, 0 when stopped.
      type: int
    restart_required:
      description: Whether it runs with an older definition.
      type: bool
    restart_reasons:
      description: What of the definition cannot be applied while it runs, and why.
      type: list
      elements: str
    error:
      description: Why it did not start, pause, resume or change in this call, with the end of its console; empty otherwise.
      type: str
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm import MicroVms
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge, unlogged

ARGUMENTS = {
    "state": {
        "type": "str",
        "choices": ["present", "running", "paused", "stopped", "restarted", "absent"],
        "default": "running",
    },
    "instances": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "name": {"type": "str", "required": True},
            "count": {"type": "int"},
            "driver": {"type": "str", "choices": ["qemu", "cloud_hypervisor"], "default": "qemu"},
            "image": {"type": "str", "default": ""},
            "data_images": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "image": {"type": "str", "required": True},
                    "target": {"type": "str", "required": True},
                },
            },
            "kernel": {"type": "str", "default": ""},
            "snapshots": {"type": "bool", "default": False},
            "from_snapshot": {"type": "str", "default": ""},
            "vcpus": {"type": "int", "default": 1},
            "vcpus_max": {"type": "int"},
            "memory": {"type": "str"},
            "memory_max": {"type": "str"},
            "memory_zones": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {"size": {"type": "str", "required": True}, "numa_node": {"type": "int"}},
            },
            "numa_node": {"type": "int"},
            "hugepages": {"type": "str"},
            "thp": {"type": "bool", "default": False},
            "balloon": {"type": "str"},
            "free_page_reporting": {"type": "bool", "default": True},
            "cid": {"type": "int"},
            "tenant": {"type": "str", "default": "default"},
            "autostart": {"type": "bool", "default": True},
            "restart_policy": {"type": "str", "choices": ["always", "on-failure", "never"], "default": "always"},
            "environment": {"type": "dict", "default": {}},
            "user_data": {
                "type": "dict",
                "options": {
                    "files": {
                        "type": "list",
                        "elements": "dict",
                        "default": [],
                        "options": {
                            "path": {"type": "str", "required": True},
                            "content": {"type": "str", "required": True, "no_log": True},
                            "mode": {"type": "str", "default": "0600"},
                        },
                    },
                    "run": {"type": "list", "elements": "str", "default": [], "no_log": True},
                },
            },
            "kernel_arguments": {"type": "list", "elements": "str", "default": []},
            "hotplug_slots": {"type": "int", "default": 0},
            "volumes": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "size": {"type": "str", "required": True},
                    "template": {"type": "str"},
                    "readonly": {"type": "bool", "default": False},
                    "mount": {"type": "str"},
                    "filesystem": {"type": "str", "choices": ["ext4", "xfs"]},
                    "writable_layer": {"type": "bool", "default": False},
                },
            },
            "shares": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "tag": {"type": "str", "required": True},
                    "source": {"type": "str", "required": True},
                    "target": {"type": "str"},
                    "readonly": {"type": "bool", "default": True},
                    "cache": {"type": "str", "choices": ["auto", "always", "metadata", "never"], "default": "auto"},
                    "dax": {"type": "str", "choices": ["never", "always"], "default": "never"},
                },
            },
            "networks": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "network": {"type": "str", "required": True},
                    "address": {"type": "str"},
                    "address6": {"type": "str"},
                    "mac": {"type": "str"},
                },
            },
            "devices": {"type": "list", "elements": "str", "default": []},
            "rate_limits": {
                "type": "dict",
                "options": {
                    "disk_bytes_per_second": {"type": "str"},
                    "disk_operations_per_second": {"type": "int"},
                    "network_bytes_per_second": {"type": "str"},
                },
            },
            "resources": {
                "type": "dict",
                "options": {
                    "cpu_weight": {"type": "int"},
                    "cpu_quota_percent": {"type": "int"},
                    "memory_max": {"type": "str"},
                    "io_weight": {"type": "int"},
                    "tasks_max": {"type": "int"},
                },
            },
        },
    },
    "networks": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "name": {"type": "str", "required": True},
            "prefix": {"type": "str"},
            "prefix6": {"type": "str"},
            "bridge": {"type": "str", "default": "agentfleet0"},
            "egress": {"type": "str", "choices": ["none", "nat", "routed"], "default": "none"},
            "egress_allow": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "prefix": {"type": "str", "required": True},
                    "protocol": {"type": "str", "choices": ["any", "tcp", "udp", "icmp"], "default": "any"},
                    "ports": {"type": "list", "elements": "str", "default": []},
                },
            },
            "host_services": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "port": {"type": "int", "required": True},
                    "protocol": {"type": "str", "choices": ["tcp", "udp"], "default": "tcp"},
                },
            },
        },
    },
    "accelerator": {"type": "str", "choices": ["auto", "kvm", "tcg"], "default": "auto"},
    "allow_restart": {"type": "bool", "default": False},
    "delete_volumes": {"type": "bool", "default": False},
    "memory_overcommit": {"type": "float", "default": 1.0},
    "parallel": {"type": "int", "default": 0},
    "ready_timeout_seconds": {"type": "int", "default": 180},
}


def main() -> None:
    """Run the module."""
    module = unlogged(AnsibleModule)(argument_spec=ARGUMENTS, supports_check_mode=True)
    converge(module, lambda: MicroVms(Host(), module.params))


if __name__ == "__main__":
    main()
