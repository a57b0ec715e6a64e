# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From the description of a lab host to a QEMU command line: validation, and a pure function.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size, parse_list, parse_size

MIB = 1 << 20
WAYS = (1, 2, 4, 8, 16, 3, 6, 12)
GRANULARITIES = tuple(256 << shift for shift in range(7))
HOST_BRIDGES = 6
# The hardware keeps its place when a description grows: slots of pcie.0, by kind.
UPLINK_SLOT, DISK_SLOT, NIC_SLOT, NVME_SLOT, LAST_SLOT = 2, 3, 4, 8, 15
# An igb's virtual functions appear 16 slots after it and take two slots; the CXL host bridges are behind them.
HOST_BRIDGE_SLOT = 0x19
Spec = dict[str, t.Any]

OPTIONS: dict[str, t.Any] = {
    "name": {"type": "str", "required": True},
    "ssh_port": {"type": "int"},
    "cpus": {"type": "int", "default": 2},
    "memory": {"type": "str"},
    "numa": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "memory": {"type": "str", "required": True},
            "cpus": {"type": "str"},
            "initiator": {"type": "int"},
            "latency_ns": {"type": "int"},
            "bandwidth": {"type": "str"},
        },
    },
    "disk": {"type": "str", "default": "16GiB"},
    "iommu": {"type": "str", "choices": ["none", "intel"], "default": "none"},
    "cxl": {
        "type": "dict",
        "options": {
            "windows": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "size": {"type": "str", "required": True},
                    "host_bridges": {"type": "list", "elements": "int", "required": True},
                    "granularity": {"type": "str", "default": "8KiB"},
                },
            },
            "devices": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "serial": {"type": "str", "required": True},
                    "size": {"type": "str", "required": True},
                    "host_bridge": {"type": "int", "required": True},
                    "persistent": {"type": "bool", "default": False},
                },
            },
        },
    },
    "nvme": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "serial": {"type": "str", "required": True},
            "controllers": {"type": "int", "default": 1},
            "namespaces": {"type": "list", "elements": "str", "required": True},
        },
    },
    "nics": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "type": {"type": "str", "choices": ["virtio", "igb"], "default": "virtio"},
            "address": {"type": "str"},
        },
    },
}


def normalize(option: str, raw: t.Mapping[str, t.Any]) -> Spec:
    """Check one description and return it in bytes and numbers; raises Refused with the option's path."""
    name = raw["name"]
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise Refused(f"{option}.name", name, "not a host name", "Use lower-case letters, digits and hyphens")
    spec: Spec = {"name": name, "iommu": raw.get("iommu") or "none"}
    spec["ssh_port"] = _between(f"{option}.ssh_port", raw.get("ssh_port") or 0, 1024, 65535)
    spec["cpus"] = _between(f"{option}.cpus", raw.get("cpus") or 2, 1, 64)
    spec["disk"] = parse_size(f"{option}.disk", raw.get("disk") or "16GiB", MIB)
    spec["numa"] = _numa(option, raw, spec["cpus"])
    spec["cxl"] = _cxl(f"{option}.cxl", raw["cxl"]) if raw.get("cxl") else {"windows": [], "devices": []}
    spec["nvme"] = _nvme(f"{option}.nvme", raw.get("nvme") or [])
    spec["nics"] = _nics(f"{option}.nics", raw.get("nics") or [])
    return spec


def _between(option: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise Refused(option, value, "out of range", f"Use {low} to {high}")
    return value


def _unique(option: str, values: t.Sequence[t.Any], what: str) -> None:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise Refused(option.format(index), value, f"the {what} is used twice", f"Give each its own {what}")


def _numa(option: str, raw: t.Mapping[str, t.Any], cpus: int) -> list[Spec]:
    given = raw.get("numa") or []
    if bool(given) == bool(raw.get("memory")):
        raise Refused(
            f"{option}.memory",
            raw.get("memory"),
            "memory is given both here and in numa" if given else "the host has no memory",
            "Give either memory, or numa with the memory of each node",
        )
    given = given or [{"memory": raw["memory"]}]
    memory_option = f"{option}.numa[{{}}].memory" if raw.get("numa") else f"{option}.memory"
    placed = any(node.get("cpus") for node in given)
    nodes: list[Spec] = []
    seen: set[int] = set()
    for index, node in enumerate(given):
        path = f"{option}.numa[{index}]"
        size = parse_size(memory_option.format(index), node["memory"], MIB)
        text = node.get("cpus") or ("" if placed or index else f"0-{cpus - 1}")
        if text and not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
            raise Refused(f"{path}.cpus", text, "not a list of CPUs", "Write a list such as 0-1 or 0,2")
        mine = parse_list(text)
        wrong = [cpu for cpu in mine if cpu >= cpus or cpu in seen]
        if wrong:
            raise Refused(
                f"{path}.cpus",
                text,
                f"CPU {wrong[0]} does not exist or belongs to another node",
                f"Divide CPUs 0 to {cpus - 1} among the nodes",
            )
        seen.update(mine)
        nodes.append(
            {
                "memory": size,
                "cpus": mine,
                "initiator": index if mine else node.get("initiator"),
                "latency_ns": node.get("latency_ns"),
                "bandwidth": parse_size(f"{path}.bandwidth", node["bandwidth"], MIB) if node.get("bandwidth") else None,
            }
        )
        if (node.get("latency_ns") is None) != (node.get("bandwidth") is None):
            raise Refused(
                f"{path}.latency_ns",
                node.get("latency_ns"),
                "HMAT needs both a latency and a bandwidth",
                "Give latency_ns and bandwidth (bytes a second, such as 20GiB), or neither",
            )
        if node.get("latency_ns") is not None:
            _between(f"{path}.latency_ns", node["latency_ns"], 1, 65000)
    if len(seen) != cpus:
        missing = sorted(set(range(cpus)) - seen)
        raise Refused(
            f"{option}.cpus", cpus, f"CPU {missing[0]} belongs to no node", "Name every CPU in one node's cpus"
        )
    for index, node in enumerate(nodes):
        initiator = node["initiator"]
        if initiator is None or not 0 <= initiator < len(nodes) or not nodes[initiator]["cpus"]:
            raise Refused(
                f"{option}.numa[{index}].initiator",
                initiator,
                "a node without CPUs needs an initiator that has some",
                f"Use one of {[i for i, other in enumerate(nodes) if other['cpus']]}",
            )
    measured = [node["latency_ns"] is not None for node in nodes]
    if any(measured) and not all(measured):
        index = measured.index(False)
        raise Refused(
            f"{option}.numa[{index}].latency_ns",
            None,
            "other nodes have a latency",
            "Give one to every node, or to none",
        )
    return nodes


def _cxl(option: str, raw: t.Mapping[str, t.Any]) -> Spec:
    windows: list[Spec] = []
    devices: list[Spec] = []
    for index, device in enumerate(raw.get("devices") or []):
        path = f"{option}.devices[{index}]"
        serial = device["serial"]
        if not re.fullmatch(r"0x[0-9a-fA-F]{1,16}|[0-9]{1,19}", str(serial)) or not int(str(serial), 0):
            raise Refused(f"{path}.serial", serial, "not a serial number", "Use a number above 0, such as 0x1")
        devices.append(
            {
                "serial": int(str(serial), 0),
                "size": parse_size(f"{path}.size", device["size"], 256 * MIB),
                "host_bridge": _between(f"{path}.host_bridge", device["host_bridge"], 0, HOST_BRIDGES - 1),
                "persistent": bool(device.get("persistent")),
            }
        )
    _unique(option + ".devices[{}].serial", [device["serial"] for device in devices], "serial number")
    bridges = {device["host_bridge"] for device in devices}
    for index, window in enumerate(raw.get("windows") or []):
        path = f"{option}.windows[{index}]"
        targets = window["host_bridges"]
        if len(targets) not in WAYS or len(set(targets)) != len(targets):
            raise Refused(
                f"{path}.host_bridges",
                targets,
                f"{len(set(targets))} host bridges cannot give this interleave",
                f"Name {', '.join(map(str, sorted(WAYS)))} different host bridges",
            )
        idle = [bridge for bridge in targets if bridge not in bridges]
        if idle:
            raise Refused(
                f"{path}.host_bridges",
                targets,
                f"no device is behind host bridge {idle[0]}, so that no region can span the window",
                f"Use host bridges with devices: {sorted(bridges)}",
            )
        granularity = parse_size(f"{path}.granularity", window.get("granularity") or "8KiB")
        if granularity not in GRANULARITIES:
            raise Refused(
                f"{path}.granularity",
                window["granularity"],
                "not a granularity that CXL knows",
                f"Use one of {', '.join(map(format_size, GRANULARITIES))}",
            )
        size = parse_size(f"{path}.size", window["size"], 256 * MIB * len(targets))
        need = sum(device["size"] for device in devices if device["host_bridge"] in targets)
        if size < need:
            raise Refused(
                f"{path}.size",
                window["size"],
                f"the devices behind its host bridges have {format_size(need)}",
                f"Use at least {format_size(need)}",
            )
        windows.append({"size": size, "host_bridges": list(targets), "granularity": granularity})
    covered = {bridge for window in windows for bridge in window["host_bridges"]}
    for index, device in enumerate(devices):
        if device["host_bridge"] not in covered:
            raise Refused(
                f"{option}.devices[{index}].host_bridge",
                device["host_bridge"],
                "no window covers this host bridge, so that the memory could never be mapped",
                f"Add it to a window, or use one of {sorted(covered)}",
            )
    return {"windows": windows, "devices": devices}


def _nvme(option: str, raw: t.Sequence[t.Mapping[str, t.Any]]) -> list[Spec]:
    subsystems: list[Spec] = []
    for index, subsystem in enumerate(raw):
        path = f"{option}[{index}]"
        serial = subsystem["serial"]
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,20}", serial):
            raise Refused(
                f"{path}.serial", serial, "not a serial number", "Use 1 to 20 letters, digits, dots or hyphens"
            )
        if not subsystem["namespaces"]:
            raise Refused(f"{path}.namespaces", [], "a subsystem without a namespace", "Give sizes such as [256MiB]")
        subsystems.append(
            {
                "serial": serial,
                "controllers": _between(f"{path}.controllers", subsystem.get("controllers") or 1, 1, 4),
                "namespaces": [
                    parse_size(f"{path}.namespaces[{number}]", size, MIB)
                    for number, size in enumerate(subsystem["namespaces"])
                ],
            }
        )
    _unique(option + "[{}].serial", [subsystem["serial"] for subsystem in subsystems], "serial number")
    total = sum(subsystem["controllers"] for subsystem in subsystems)
    if total > LAST_SLOT - NVME_SLOT + 1:
        raise Refused(option, total, "too many controllers", f"Use at most {LAST_SLOT - NVME_SLOT + 1} in all")
    return subsystems


def _nics(option: str, raw: t.Sequence[t.Mapping[str, t.Any]]) -> list[Spec]:
    if len(raw) > NVME_SLOT - NIC_SLOT:
        raise Refused(option, len(raw), "too many NICs", f"Use at most {NVME_SLOT - NIC_SLOT} besides the uplink")
    nics: list[Spec] = []
    for index, nic in enumerate(raw):
        address = nic.get("address")
        if address is not None:
            try:
                if "/" not in address:
                    raise ValueError
                address = str(ipaddress.ip_interface(address))
            except ValueError:
                raise Refused(
                    f"{option}[{index}].address",
                    address,
                    "not an address with its prefix",
                    "Write one such as 10.77.0.11/24",
                ) from None
        nics.append({"type": nic.get("type") or "virtio", "address": address})
        if [nic["type"] for nic in nics[-2:]] == ["igb", "igb"]:
            raise Refused(
                f"{option}[{index}].type",
                "igb",
                "the virtual functions of two igb cards side by side would be at the same PCI addresses",
                "Put a virtio card between them",
            )
    return nics


def check_together(option: str, specs: t.Sequence[Spec]) -> None:
    """What must differ between the hosts of one lab."""
    _unique(option + "[{}].name", [spec["name"] for spec in specs], "name")
    _unique(option + "[{}].ssh_port", [spec["ssh_port"] for spec in specs], "port")
    used: set[str] = set()
    for index, spec in enumerate(specs):
        for number, nic in enumerate(spec["nics"]):
            if nic["address"] in used:
                raise Refused(
                    f"{option}[{index}].nics[{number}].address",
                    nic["address"],
                    "the address is used twice",
                    "Give each NIC of the lab its own address",
                )
            if nic["address"]:
                used.add(nic["address"])


def memory_bytes(spec: Spec) -> int:
    """What a running host can take of this machine's memory."""
    volatile = sum(device["size"] for device in spec["cxl"]["devices"] if not device["persistent"])
    return int(sum(node["memory"] for node in spec["numa"]) + volatile)


def backing_files(spec: Spec) -> dict[str, int]:
    """Name -> size of the files beside the disk that hold what survives a power cut."""
    files: dict[str, int] = {}
    for index, subsystem in enumerate(spec["nvme"]):
        for number, size in enumerate(subsystem["namespaces"]):
            files[f"nvme{index}n{number + 1}.img"] = size
    for index, device in enumerate(spec["cxl"]["devices"]):
        if device["persistent"]:
            files[f"cxl{index}.img"] = device["size"]
            files[f"cxl{index}.labels"] = MIB
    return files


def mac_address(name: str, index: int) -> str:
    """A NIC's address: locally administered, and the same at every start."""
    part = hashlib.sha256(name.encode()).digest()
    return "52:54:" + ":".join(f"{byte:02x}" for byte in (*part[:3], index))


def credentials(spec: Spec, accelerator: str) -> dict[str, str]:
    """What makes this host differ from another one of the same image, as systemd credentials."""
    found = {
        "system.hostname": spec["name"],
        "system.machine_id": hashlib.sha256(f"agentfleet lab {spec['name']}".encode()).hexdigest()[:32],
    }
    for index, nic in enumerate(spec["nics"]):
        if nic["address"]:
            found[f"network.network.20-lab{index}"] = (
                f"[Match]\nMACAddress={mac_address(spec['name'], index + 1)}\n"
                f"[Network]\nAddress={nic['address']}\nLinkLocalAddressing=no\nIPv6AcceptRA=no\nLLDP=no\n"
            )
    if accelerator == "tcg":
        # Two guests of the emulated host that run at the same moment on two of its CPUs reset each other or the host.
        found["systemd.unit-dropin.agentfleet.slice"] = "[Slice]\nAllowedCPUs=0\n"
    return found


def segment(lab_directory: str) -> str:
    """The multicast group and port that are a lab's own Ethernet segment on the loopback interface."""
    part = hashlib.sha256(lab_directory.encode()).digest()
    return f"239.192.{part[0]}.{part[1]}:{20000 + int.from_bytes(part[2:4], 'big') % 10000}"


def argv(spec: Spec, directory: str, lab_directory: str, program: str, accelerator: str) -> list[str]:
    """QEMU's command line; a pure function of the description.

    :param directory: where the host's files are
    :param accelerator: ``tcg`` or ``kvm``
    """
    cxl = spec["cxl"]
    # What a server of today has not, and firmware and kernel would spend seconds on looking for.
    machine = ["q35", "kernel-irqchip=split", "sata=off", "smbus=off", "i8042=off"]
    machine += ["hmat=on" if spec["numa"][0]["latency_ns"] is not None else "hmat=off"]
    machine += ["cxl=on"] if cxl["windows"] else []
    for index, window in enumerate(cxl["windows"]):
        machine += [f"cxl-fmw.{index}.targets.{i}=hb{bridge}" for i, bridge in enumerate(window["host_bridges"])]
        machine += [f"cxl-fmw.{index}.size={window['size']}"]
        machine += [f"cxl-fmw.{index}.interleave-granularity={window['granularity']}"]
    line = [
        program,
        "-name",
        spec["name"],
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-machine",
        ",".join(machine),
    ]
    # Without the hypervisor bit the kernel flushes caches itself, without which it commits no CXL region.
    line += (
        ["-accel", "kvm", "-cpu", "host"]
        if accelerator == "kvm"
        # Four levels of page tables instead of five, in the host and in its guests: walks are what emulation is slow at.
        else ["-accel", "tcg,thread=multi", "-cpu", "max,-hypervisor,-la57,-pku,-pks"]
    )
    line += ["-smp", str(spec["cpus"]), "-m", f"{sum(node['memory'] for node in spec['numa']) // MIB}M"]
    line += ["-action", "reboot=shutdown,shutdown=poweroff"]
    line += _numa_argv(spec["numa"])
    if spec["iommu"] == "intel":
        line += ["-device", "intel-iommu,intremap=on,caching-mode=on"]
    line += _cxl_argv(cxl, directory)
    # cache=unsafe: a flush of the guest reaches this machine's page cache, which outlives QEMU however it ends. A lab
    # host's power cut is QEMU's end, so it loses exactly what real hardware may lose; only a crash of this machine
    # itself can damage the disk, and then the host is reset.
    line += ["-drive", f"file={_escape(directory)}/disk.qcow2,if=none,id=disk,format=qcow2,cache=unsafe,discard=unmap"]
    line += ["-device", f"virtio-blk-pci,drive=disk,bus=pcie.0,addr={DISK_SLOT:#x},serial=lab-root,bootindex=0"]
    line += _nvme_argv(spec["nvme"], directory)
    # romfile= : no NIC shall offer to boot, which costs seconds.
    line += ["-netdev", f"user,id=uplink,hostfwd=tcp:127.0.0.1:{spec['ssh_port']}-:22"]
    line += ["-device", _nic("virtio-net-pci", "uplink", spec["name"], 0, UPLINK_SLOT)]
    for index, nic in enumerate(spec["nics"]):
        line += ["-netdev", f"socket,id=lab{index},mcast={segment(lab_directory)},localaddr=127.0.0.1"]
        model = "igb" if nic["type"] == "igb" else "virtio-net-pci"
        line += ["-device", _nic(model, f"lab{index}", spec["name"], index + 1, NIC_SLOT + index)]
    for key, value in credentials(spec, accelerator).items():
        encoded = base64.b64encode(value.encode()).decode()
        line += ["-smbios", f"type=11,value=io.systemd.credential.binary:{key}={encoded}"]
    line += [
        "-chardev",
        f"file,id=console,path={_escape(directory)}/console.log,append=on",
        "-serial",
        "chardev:console",
    ]
    return line


def _escape(text: str) -> str:
    """A comma in a QEMU option's value is doubled."""
    return text.replace(",", ",,")


def _nic(model: str, netdev: str, name: str, index: int, slot: int) -> str:
    return f"{model},netdev={netdev},mac={mac_address(name, index)},bus=pcie.0,addr={slot:#x},romfile="


def _numa_argv(nodes: t.Sequence[Spec]) -> list[str]:
    line: list[str] = []
    for index, node in enumerate(nodes):
        measured = node["latency_ns"] is not None
        line += ["-object", f"memory-backend-ram,id=dram{index},size={node['memory']}"]
        cpus = "".join(f",cpus={cpu}" for cpu in node["cpus"])
        initiator = f",initiator={node['initiator']}" if measured else ""
        line += ["-numa", f"node,nodeid={index},memdev=dram{index}{cpus}{initiator}"]
    for index, node in enumerate(nodes):
        if node["latency_ns"] is not None:
            pair = f"hmat-lb,initiator={node['initiator']},target={index},hierarchy=memory"
            line += ["-numa", f"{pair},data-type=access-latency,latency={node['latency_ns']}"]
            line += ["-numa", f"{pair},data-type=access-bandwidth,bandwidth={node['bandwidth'] // MIB}M"]
    return line


def _cxl_argv(cxl: Spec, directory: str) -> list[str]:
    line: list[str] = []
    bridges = sorted({device["host_bridge"] for device in cxl["devices"]})
    for bridge in bridges:
        line += [
            "-device",
            f"pxb-cxl,bus_nr={32 * (bridge + 1)},bus=pcie.0,id=hb{bridge},addr={HOST_BRIDGE_SLOT + bridge:#x}",
        ]
    ports = dict.fromkeys(bridges, 0)
    for index, device in enumerate(cxl["devices"]):
        bridge = device["host_bridge"]
        if device["persistent"]:
            for kind, size in (("img", device["size"]), ("labels", MIB)):
                path = f"{_escape(directory)}/cxl{index}.{kind}"
                line += ["-object", f"memory-backend-file,id=cxl{index}-{kind},mem-path={path},size={size},share=on"]
            memory = f"persistent-memdev=cxl{index}-img,lsa=cxl{index}-labels"
        else:
            line += ["-object", f"memory-backend-ram,id=cxl{index}-ram,size={device['size']},share=on"]
            memory = f"volatile-memdev=cxl{index}-ram"
        line += ["-device", f"cxl-rp,port={ports[bridge]},bus=hb{bridge},id=rp{index},chassis=0,slot={index + 2}"]
        line += ["-device", f"cxl-type3,bus=rp{index},{memory},id=cxl{index},sn={device['serial']:#x}"]
        ports[bridge] += 1
    return line


def _nvme_argv(subsystems: t.Sequence[Spec], directory: str) -> list[str]:
    line: list[str] = []
    slot = NVME_SLOT
    for index, subsystem in enumerate(subsystems):
        line += ["-device", f"nvme-subsys,id=subsys{index},nqn=lab-{subsystem['serial']}"]
        for controller in range(subsystem["controllers"]):
            # romfile= does not exist here; no bootindex keeps the firmware from booting it.
            options = f"serial={subsystem['serial']},subsys=subsys{index},bus=pcie.0,addr={slot:#x}"
            line += ["-device", f"nvme,id=nvme{index}c{controller},{options}"]
            slot += 1
        for number, _size in enumerate(subsystem["namespaces"], 1):
            path = f"{_escape(directory)}/nvme{index}n{number}.img"
            line += ["-drive", f"file={path},if=none,id=nvme{index}n{number},format=raw,cache=unsafe,discard=unmap"]
            line += ["-device", f"nvme-ns,drive=nvme{index}n{number},bus=nvme{index}c0,nsid={number}"]
    return line
