#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module threefs_config: configuration of the services of a 3FS cluster."""

from __future__ import annotations

DOCUMENTATION = r"""
module: threefs_config
short_description: Write and publish the configuration of 3FS services
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Makes launcher, app and main files of all services of a host in one call from the files that ship with the
    release, with the keys that make them this cluster's, profiles, and declared keys. Comments and order stay.
  - With O(publish), mgmtd gets the main configurations to keep and hand out. The first time this is
    C(init-cluster), later C(set-config) where they differ.
  - Main configurations are one for all services of a kind, so that all hosts are given the same; ports and target paths, too.
    A service that runs refuses one that changes a key which it reads only when it starts; RV(restarts) names it for any change.
extends_documentation_fragment:
  - agentfleet.metal.attributes
options:
  cluster:
    description: Name of the cluster, which is 3FS's cluster id. Several clusters can share a host.
    type: str
    required: true
  release:
    description: Directory of the unpacked release (module M(agentfleet.metal.artifact)).
    type: path
    required: true
  services:
    description: Services of this host.
    type: list
    elements: str
    choices: [mgmtd, meta, storage, fuse, monitor]
    default: []
  node_ids:
    description: Id of each service of this host, unique in the cluster and for ever.
    type: dict
    default: {}
    suboptions:
      mgmtd:
        description: 1 to 99.
        type: int
      meta:
        description: 100 to 9999.
        type: int
      storage:
        description: 10000 to 999999.
        type: int
  mgmtd:
    description: Hosts of mgmtd, each C(HOST) or C(HOST:PORT). Names are resolved here, since upstream's services know addresses only.
    type: list
    elements: str
    required: true
  monitor:
    description: Host of the monitor collector, C(HOST) or C(HOST:PORT). Without it services do not report.
    type: str
  fdb_cluster:
    description:
      - Connection string of the cluster's own FoundationDB database (its keys have no prefix).
      - A host that has it already keeps what it has, if this is left out.
      - It is written for root alone, on hosts with mgmtd or meta and where O(token) or O(publish) is given. Other hosts do not open
        the database; a cluster file that is there is removed.
    type: str
  ports:
    description: Ports, the same on all hosts. The RDMA handshake needs its port over TCP, too.
    type: dict
    default: {}
    suboptions:
      mgmtd:
        description: V(8000) and V(9000), if left out.
        type: dict
        suboptions:
          rdma:
            description: Port of the RDMA handshake.
            type: int
          tcp:
            description: Port of the TCP service.
            type: int
      meta:
        description: V(8001) and V(9001), if left out.
        type: dict
        suboptions:
          rdma:
            description: Port of the RDMA handshake.
            type: int
          tcp:
            description: Port of the TCP service.
            type: int
      storage:
        description: V(8002) and V(9002), if left out; upstream's own are those of mgmtd.
        type: dict
        suboptions:
          rdma:
            description: Port of the RDMA handshake.
            type: int
          tcp:
            description: Port of the TCP service.
            type: int
      monitor:
        description: V(10000), if left out.
        type: dict
        suboptions:
          tcp:
            description: Port of the monitor collector.
            type: int
  authenticate:
    description: Whether mgmtd and meta check tokens. Upstream's default is V(false), and tokens mean nothing then.
    type: bool
    default: true
  target_paths:
    description:
      - Paths of the targets, the same on all storage hosts in the same order; the place is the disk's index.
      - Another order than before is refused. New disks come last.
    type: list
    elements: str
    default: []
  allow_disk_without_uuid:
    description: Take plain directories for targets. For tests.
    type: bool
    default: false
  mountpoint:
    description: Where FUSE mounts the cluster.
    type: path
  token:
    description: Token of an administrator for admin_cli on this host. Written to a file that only root reads.
    type: str
  fuse_token:
    description: Token of the user under which FUSE acts.
    type: str
  clickhouse:
    description: ClickHouse server to which the monitor collector writes.
    type: dict
    default: {}
    suboptions:
      host:
        description: Its address or name.
        type: str
      port:
        description: Its native port; 9000, if left out, which is also that of mgmtd on TCP.
        type: str
      db:
        description: Database of this cluster; V(3fs), if left out. Clusters with the same ClickHouse need one each.
        type: str
      user:
        description: User.
        type: str
      password:
        description: The user's password.
        type: str
  rdma_devices:
    description: RDMA devices to use, such as V(mlx5_0); all that are usable, if empty.
    type: list
    elements: str
    default: []
  skip_checks:
    description:
      - Checks of the host that are passed over. V(rdma) asks for a device with an active port and a usable GID, V(clock)
        for a synchronized clock, V(memory) for enough of it, V(shm) for room for O(usrbio_memory).
    type: list
    elements: str
    choices: [rdma, clock, memory, shm]
    default: []
  usrbio_memory:
    description:
      - Buffers (C(iov)) that programs of this host register with FUSE for USRBIO, all together, such as V(8GiB). They lie in
        C(/dev/shm), which must have room for them.
    type: str
  profiles:
    description:
      - Sets of tuned keys, later ones over earlier ones. V(large_io), V(small_io), V(client), V(usrbio), V(erdma) and
        V(small_memory).
    type: list
    elements: str
    default: []
  settings:
    description:
      - File (without C(.toml)) to dotted key to value, over everything else. V(server.base.groups[RDMA].listener) takes
        the element of an array of tables that has this word as a value, V([0]) the first, and C(**.key) each place
        with this key. A key that the file does not have is refused, unless it is written with C(+) in front.
    type: dict
    default: {}
  publish:
    description: Whether this host tells mgmtd the main configurations. One host of a cluster does.
    type: bool
    default: false
  publish_wait_seconds:
    description: How long to wait for a primary mgmtd; with V(0) it is left for a later call when none answers.
    type: int
    default: 0
  root_layout:
    description: Layout of the root directory when the cluster is made.
    type: dict
    default: {}
    suboptions:
      chain_table:
        description: Id of the chain table.
        type: int
        default: 1
      chunk_size:
        description: Size of chunks.
        type: str
        default: 1MiB
      stripe:
        description: Chains over which a file is spread.
        type: int
        default: 16
"""

EXAMPLES = r"""
- name: Configure a storage host
  agentfleet.metal.threefs_config:
    cluster: stage
    release: /opt/3fs/0123456789abcdef
    services: [storage]
    node_ids: {storage: 10001}
    mgmtd: [10.0.0.1, 10.0.0.2]
    fdb_cluster: metal:Zw3gGq7B@10.0.0.1:4500,10.0.0.2:4500,10.0.0.3:4500
    target_paths: [/storage/data1/3fs, /storage/data2/3fs]
    profiles: [large_io]
    settings:
      storage_main:
        server.aio_read_worker.num_threads: 128
"""

RETURN = r"""
description:
  description: What this host has of the cluster; nothing secret.
  returned: success
  type: dict
published:
  description: Whether mgmtd was seen to keep exactly these main configurations.
  returned: success
  type: bool
restarts:
  description: Services that have to be restarted for what this run changed, or would change.
  returned: success
  type: list
  elements: str
plan:
  description: The steps, each with verb, object, before, after, why and disruptive.
  returned: success
  type: list
  elements: dict
refused:
  description: Option, value, problem and remedy, when a wish is refused.
  returned: when a wish is refused
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge, unlogged
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_config import Config


def main() -> None:
    """Entry point."""
    module = unlogged(AnsibleModule)(
        argument_spec={
            "cluster": {"type": "str", "required": True},
            "release": {"type": "path", "required": True},
            "services": {
                "type": "list",
                "elements": "str",
                "choices": ["mgmtd", "meta", "storage", "fuse", "monitor"],
                "default": [],
            },
            "node_ids": {
                "type": "dict",
                "default": {},
                "options": {"mgmtd": {"type": "int"}, "meta": {"type": "int"}, "storage": {"type": "int"}},
            },
            "mgmtd": {"type": "list", "elements": "str", "required": True},
            "monitor": {"type": "str"},
            "fdb_cluster": {"type": "str"},
            "ports": {
                "type": "dict",
                "default": {},
                "options": {
                    "mgmtd": {"type": "dict", "options": {"rdma": {"type": "int"}, "tcp": {"type": "int"}}},
                    "meta": {"type": "dict", "options": {"rdma": {"type": "int"}, "tcp": {"type": "int"}}},
                    "storage": {"type": "dict", "options": {"rdma": {"type": "int"}, "tcp": {"type": "int"}}},
                    "monitor": {"type": "dict", "options": {"tcp": {"type": "int"}}},
                },
            },
            "authenticate": {"type": "bool", "default": True},
            "target_paths": {"type": "list", "elements": "str", "default": []},
            "allow_disk_without_uuid": {"type": "bool", "default": False},
            "mountpoint": {"type": "path"},
            "token": {"type": "str", "no_log": True},
            "fuse_token": {"type": "str", "no_log": True},
            "clickhouse": {
                "type": "dict",
                "default": {},
                "options": {
                    "host": {"type": "str"},
                    "port": {"type": "str"},
                    "db": {"type": "str"},
                    "user": {"type": "str"},
                    "password": {"type": "str", "no_log": True},
                },
            },
            "rdma_devices": {"type": "list", "elements": "str", "default": []},
            "skip_checks": {
                "type": "list",
                "elements": "str",
                "choices": ["rdma", "clock", "memory", "shm"],
                "default": [],
            },
            "usrbio_memory": {"type": "str"},
            "profiles": {"type": "list", "elements": "str", "default": []},
            "settings": {"type": "dict", "default": {}},
            "publish": {"type": "bool", "default": False},
            "publish_wait_seconds": {"type": "int", "default": 0},
            "root_layout": {
                "type": "dict",
                "default": {},
                "options": {
                    "chain_table": {"type": "int", "default": 1},
                    "chunk_size": {"type": "str", "default": "1MiB"},
                    "stripe": {"type": "int", "default": 16},
                },
            },
        },
        supports_check_mode=True,
    )
    converge(module, lambda: Config(Host(), module.params))


if __name__ == "__main__":
    main()
