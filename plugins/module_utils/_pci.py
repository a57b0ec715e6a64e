# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""PCI functions, what they are used for, and the IOMMU groups they are in; read from sysfs, procfs and `ip`."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused

DEVICES = "/sys/bus/pci/devices"
ADDRESS = re.compile(r"^[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$")
IDENTITY = re.compile(r"^[0-9a-f]{4}:[0-9a-f]{4}$")
_QUOTED = "in quotes since YAML takes many addresses for numbers, such as '0000:01:00.0'"
_SYSTEM_MOUNTS = re.compile(r"^/(boot.*|efi|usr|var|etc)?$")
_KINDS = {"dmar": "intel", "ivhd": "amd", "smmu": "smmu", "ummu": "ummu", "viommu": "virtio"}
_TABLES = {"DMAR": "intel", "IVRS": "amd", "IORT": "smmu", "VIOT": "virtio"}


def observe_pci(host: Host, booting: bool = False) -> dict[str, t.Any]:
    """All PCI functions of the host.

    ``in_use`` gives each use that a rebind would break as a text; ``boot_critical``
    says that one of them is the running system or the way to reach it. ``users`` are
    the processes (``pid name``) that hold the vfio nodes of a function or its group open.

    :param booting: what an interface got by itself since the start (addresses, a place below another) is no use
    """
    addresses = sorted(host.names(DEVICES))  # hexadecimal, so plain order
    uses = {address: list[str]() for address in addresses}
    vital: set[str] = set()
    opened = list(_open_nodes(host))
    blocks, nets = _block_uses(host, opened, uses, vital), _network_uses(host, uses, vital, booting)
    return {
        "functions": [
            {
                **_function(host, address),
                "netdevs": nets.get(address, []),
                "blockdevs": blocks.get(address, []),
                "in_use": uses[address],
                "users": _users(host, address, opened),
                "boot_critical": address in vital,
            }
            for address in addresses
        ]
    }


def observe_iommu(host: Host) -> dict[str, t.Any]:
    """The IOMMU: which kind the hardware has, whether the kernel uses it, and its groups."""
    kinds = [kind for name in host.names("/sys/class/iommu") for key, kind in _KINDS.items() if name.startswith(key)]
    tables = [kind for table, kind in _TABLES.items() if host.exists(f"/sys/firmware/acpi/tables/{table}")]
    groups = [
        {
            "id": int(name),
            "type": host.read(f"/sys/kernel/iommu_groups/{name}/type"),
            "functions": [
                device for device in host.names(f"/sys/kernel/iommu_groups/{name}/devices") if ADDRESS.match(device)
            ],
        }
        for name in host.names("/sys/kernel/iommu_groups")
    ]
    return {
        "enabled": bool(groups),
        "kind": (kinds + tables + [""])[0],
        "groups": groups,
        "iommufd": host.exists("/dev/iommu"),
    }


def _function(host: Host, address: str) -> dict[str, t.Any]:
    path = f"{DEVICES}/{address}"
    override = host.read(f"{path}/driver_override")
    total = host.read_int(f"{path}/sriov_totalvfs", 0)
    group = host.link_name(f"{path}/iommu_group")
    return {
        "address": address,
        "vendor": host.read(f"{path}/vendor")[2:],
        "device": host.read(f"{path}/device")[2:],
        "class": host.read(f"{path}/class")[2:],
        "driver": host.link_name(f"{path}/driver"),
        "driver_override": "" if override == "(null)" else override,
        "iommu_group": int(group) if group else None,
        "numa_node": host.read_int(f"{path}/numa_node", -1),
        "physfn": host.link_name(f"{path}/physfn"),
        "sriov": {
            "totalvfs": total,
            "numvfs": host.read_int(f"{path}/sriov_numvfs", 0),
            "autoprobe": host.read(f"{path}/sriov_drivers_autoprobe") != "0",
            "vfs": [host.link_name(f"{path}/{name}") for name in host.names(path) if name.startswith("virtfn")],
        }
        if total
        else {},
    }


def _owners(host: Host, path: str) -> set[str]:
    """The PCI functions that a class device belongs to: its own, and one that has others behind it (Intel VMD)."""
    found = {part for part in os.path.realpath(host.path(path)).split("/") if ADDRESS.match(part)}
    return {address for address in found if not host.read(f"{DEVICES}/{address}/class").startswith("0x06")}


def _open_nodes(host: Host) -> t.Iterator[tuple[str, str]]:
    """(device node, ``pid name`` of a process that has it open); udev's, which only look at what a disk has, left out."""
    for process in host.names("/proc"):
        if not process.isdigit():
            continue
        try:
            links = os.listdir(host.path(f"/proc/{process}/fd"))  # of all processes there are too many to sort
        except OSError:
            continue
        name = host.read(f"/proc/{process}/comm")
        if name in ("(udev-worker)", "systemd-udevd"):
            continue
        for link in links:
            try:
                node = os.readlink(host.path(f"/proc/{process}/fd/{link}"))
            except OSError:  # closed meanwhile
                continue
            if node.startswith("/dev/"):
                yield node, f"{process} {name}"


# -- block devices ---------------------------------------------------------------


def _block_owners(host: Host, name: str) -> set[str]:
    """The functions under a block device, through partitions, dm, md and NVMe multipath."""
    path = f"/sys/class/block/{name}"
    real = os.path.realpath(host.path(path))
    if host.exists(f"{path}/partition"):
        return _block_owners(host, os.path.basename(os.path.dirname(real)))
    if "/nvme-subsystem/" in real:  # the multipath head is a virtual device; its controllers are links beside it
        subsystem = f"/sys/class/nvme-subsystem/{os.path.basename(os.path.dirname(real))}"
        links = [f"{subsystem}/{link}" for link in host.names(subsystem) if re.match(r"^nvme\d+$", link)]
        return set().union(*(_owners(host, link) for link in links))
    slaves = host.names(f"{path}/slaves")
    if slaves:
        return set().union(*(_block_owners(host, slave) for slave in slaves))
    return _owners(host, path)


def _block_uses(
    host: Host, opened: t.Iterable[tuple[str, str]], uses: dict[str, list[str]], vital: set[str]
) -> dict[str, list[str]]:
    """Add the uses of block devices; returns function -> its disks."""
    owners = {name: _block_owners(host, name) for name in host.names("/sys/class/block")}
    disks: dict[str, list[str]] = {}

    def use(name: str, text: str, is_vital: bool = False) -> None:
        for address in owners.get(name, ()):
            if address in uses and text not in uses[address]:
                uses[address].append(text)
            if is_vital:
                vital.add(address)

    for name, target in _mounts(host):
        use(name, f"{name} is mounted at {target}", bool(_SYSTEM_MOUNTS.match(target)))
    for line in host.read("/proc/swaps").splitlines()[1:]:
        name = _device_name(host, line.split()[0])
        use(name, f"{name} is swap", True)
    for node, process in opened:  # a virtual machine's or a database's raw disk, which need not claim it
        use(node[5:], f"{node[5:]} is open in process {process}")
    for name, addresses in owners.items():
        path = f"/sys/class/block/{name}"
        for holder in host.names(f"{path}/holders"):
            use(name, f"{name} is held by {host.read(f'/sys/class/block/{holder}/dm/name') or holder}")
        if host.exists(f"{path}/partition") or host.names(f"{path}/slaves") or host.read(f"{path}/hidden") == "1":
            continue
        for address in addresses:
            disks.setdefault(address, []).append(name)
            if not uses.get(address, True) and _claimed(host, f"/dev/{name}"):
                use(name, f"{name} is claimed by the kernel")
    return disks


def _mounts(host: Host) -> t.Iterator[tuple[str, str]]:
    """(block device, mount point) of each mounted file system that has a device."""
    for line in host.read("/proc/self/mountinfo").splitlines():
        fields, _dash, rest = line.partition(" - ")
        _id, _parent, number, _root, target = fields.split()[:5]
        # btrfs has a number of its own, so the source is the second way to the device
        name = host.link_name(f"/sys/dev/block/{number}") or _device_name(host, rest.split()[1])
        if name:
            yield name, target.replace("\\040", " ")


def _device_name(host: Host, source: str) -> str:
    """Kernel name of ``/dev/...`` (through /dev/mapper and /dev/disk links)."""
    return os.path.basename(os.path.realpath(host.path(source))) if source.startswith("/dev/") else ""


def _claimed(host: Host, path: str) -> bool:
    """Whether an exclusive open is refused: ZFS, a second btrfs device and others that leave no trace in sysfs."""
    try:
        os.close(os.open(host.path(path), os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


# -- network -----------------------------------------------------------------------


def _lower(host: Host, name: str) -> set[str]:
    """An interface and those below it (bond, bridge, VLAN, macvlan)."""
    below = [link[6:] for link in host.names(f"/sys/class/net/{name}") if link.startswith("lower_")]
    return {name}.union(*(_lower(host, link) for link in below))


def _network_uses(host: Host, uses: dict[str, list[str]], vital: set[str], booting: bool) -> dict[str, list[str]]:
    """Add the uses of network interfaces; returns function -> its interfaces."""
    owners = {name: _owners(host, f"/sys/class/net/{name}") for name in host.names("/sys/class/net")}
    found: dict[str, list[str]] = {}
    for name, on in owners.items():
        for address in on:
            found.setdefault(address, []).append(name)

    def use(top: str, what: str, is_vital: bool = False, is_automatic: bool = False) -> None:
        for name in sorted(_lower(host, top)):
            text = f"{name} carries {what}"
            for address in owners.get(name, set()) & set(uses):
                if is_automatic and host.exists(f"{DEVICES}/{address}/physfn"):
                    continue  # DHCP for whatever there is takes new VFs, too
                if text not in uses[address]:
                    uses[address].append(text)
                if is_vital:
                    vital.add(address)

    routes, addresses = list(_routes(host)), list(_addresses(host))
    for network, name in routes:
        if network.prefixlen == 0:
            use(name, "the default route", True)
    peer, server, zone = _ssh_ends(host)
    if peer is not None:
        names = [zone] if zone else [name for name, held, _dynamic in addresses if held == server]
        nearest = sorted((network.prefixlen, name) for network, name in routes if peer in network)[-1:]
        for name in names or [name for _length, name in nearest]:
            use(name, f"this connection (ssh from {peer})", True)
    if not booting:
        up = [name for name in owners if (host.read_int(f"/sys/class/net/{name}/flags", 0) or 0) & 1]
        for name, held, dynamic in addresses:
            if name in up:
                use(name, f"the address {held}", is_automatic=dynamic)
        for name in up:
            for upper in host.names(f"/sys/class/net/{name}"):
                if upper.startswith("upper_"):
                    use(name, f"the interface {upper[6:]}")
    for address, texts in uses.items():
        path = f"{DEVICES}/{address}"
        driver = host.link_name(f"{path}/driver")
        nets = host.glob(f"{path}/net") + host.glob(f"{path}/virtio*/net")
        if driver and "vfio" not in driver and any(not host.names(net) for net in nets):
            texts.append("its network interface is in another network namespace")
    return found


def _addresses(host: Host) -> t.Iterator[tuple[str, t.Any, bool]]:
    """(interface, address, whether it is a lease) of each address that reaches further than its link."""
    try:
        shown = host.run_json(["ip", "-json", "address", "show"])
    except HostError:
        return
    for interface in shown:
        for entry in interface.get("addr_info", []):
            if entry.get("scope") not in ("link", "host") and "local" in entry:
                yield interface["ifname"], ipaddress.ip_address(entry["local"]), bool(entry.get("dynamic"))


def _routes(host: Host) -> t.Iterator[tuple[t.Any, str]]:
    """(network, interface) of each unicast route of the main tables."""
    for line in host.read("/proc/net/route").splitlines()[1:]:
        fields = line.split()
        target, mask = (int.from_bytes(bytes.fromhex(fields[i]), "little") for i in (1, 7))
        yield ipaddress.ip_network((target, bin(mask).count("1")), strict=False), fields[0]
    for line in host.read("/proc/net/ipv6_route").splitlines():
        fields = line.split()
        if fields[9] != "lo" and not int(fields[8], 16) & 0x200:  # RTF_REJECT
            yield ipaddress.ip_network((bytes.fromhex(fields[0]), int(fields[1], 16)), strict=False), fields[9]


def _ssh_ends(host: Host) -> tuple[t.Any, t.Any, str]:
    """(peer, own address, interface if it is link-local) of the ssh connection that this process runs under.

    sudo hides the variable, so that a process above is asked.
    """
    process = str(os.getpid())
    while process not in ("", "0", "1"):
        for entry in host.read(f"/proc/{process}/environ").split("\0"):
            if entry.startswith("SSH_CONNECTION="):
                try:
                    peer, _port, server = entry[15:].split()[:3]
                    return _ip(peer), _ip(server), server.partition("%")[2]
                except ValueError:
                    return None, None, ""
        parent = re.search(r"^PPid:\s*(\d+)", host.read(f"/proc/{process}/status"), re.MULTILINE)
        process = parent.group(1) if parent else ""
    return None, None, ""


def _ip(text: str) -> t.Any:
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


# -- what bindings and VFs share ----------------------------------------------------


def address_of(option: str, value: t.Any) -> str:
    """A full PCI address in the kernel's spelling; refused when it is not one."""
    address = str(value).strip().lower()
    if not ADDRESS.match(address):
        remedy = f"Write it with its domain as `lspci -D` shows it, {_QUOTED}"
        raise Refused(option, value, "not a PCI address", remedy)
    return address


def identity_of(option: str, value: t.Any) -> str:
    """``vendor:device`` in lower case; refused when it is not one."""
    identity = str(value).strip().lower()
    if not IDENTITY.match(identity):
        remedy = "Write four hexadecimal digits each as `lspci -nn` shows them, quoted, such as '8086:10c9'"
        raise Refused(option, value, "not a vendor:device pair", remedy)
    return identity


def matching(functions: t.Iterable[dict[str, t.Any]], identity: str) -> list[dict[str, t.Any]]:
    """The functions of a ``vendor:device``, virtual ones included, in order of address."""
    return [function for function in functions if f"{function['vendor']}:{function['device']}" == identity]


def one(functions: list[dict[str, t.Any]], option: str, value: str) -> dict[str, t.Any]:
    """The one function of an address or of a ``vendor:device``; refused when there is none or more."""
    found = [function for function in functions if function["address"] == value] or matching(functions, value)
    if len(found) == 1:
        return found[0]
    if found:
        addresses = ", ".join(function["address"] for function in found)
        raise Refused(option, value, f"{len(found)} functions match", f"Name one by its address: {addresses}")
    raise Refused(option, value, "no such PCI function on this host", "`lspci -Dnn` lists those that are there")


def wait_for(host: Host, addresses: t.Iterable[str], seconds: float, with_driver: bool = False) -> None:
    """At boot: wait until functions are there; who is still missing then is the plan's matter."""
    paths = [f"{DEVICES}/{address}{'/driver' if with_driver else ''}" for address in addresses]
    try:
        host.wait(lambda: all(host.exists(path) for path in paths), "PCI functions", seconds)
    except HostError:
        return


def _users(host: Host, address: str, opened: t.Iterable[tuple[str, str]]) -> list[str]:
    nodes = vfio_nodes(host, address)
    return list(dict.fromkeys(process for node, process in opened if node in nodes)) if nodes else []


def vfio_nodes(host: Host, address: str) -> list[str]:
    """The device nodes through which a function bound to vfio is used."""
    nodes = [f"/dev/vfio/{host.link_name(f'{DEVICES}/{address}/iommu_group') or '-'}"]
    nodes += [f"/dev/vfio/devices/{name}" for name in host.names(f"{DEVICES}/{address}/vfio-dev")]
    return [node for node in nodes if host.exists(node)]


def function_of(option: str, value: t.Any) -> str:
    """An address or a ``vendor:device``; refused when it is neither."""
    text = str(value).strip().lower()
    if not (ADDRESS.match(text) or IDENTITY.match(text)):
        remedy = f"Write a vendor:device such as '8086:10c9', or an address, {_QUOTED}"
        raise Refused(option, value, "neither a PCI address nor a vendor:device pair", remedy)
    return text


def virtual_function(host: Host, pf: dict[str, t.Any], number: int) -> dict[str, t.Any]:
    """A VF that is not there yet, where the PF's capability says that it will be."""
    path = f"{DEVICES}/{pf['address']}"
    domain, bus, slot, function = re.split("[:.]", pf["address"])
    offset, stride = (host.read_int(f"{path}/sriov_{name}", 0) or 0 for name in ("offset", "stride"))
    rid = (int(bus, 16) << 8) + (int(slot, 16) << 3) + int(function) + offset + number * stride
    return {
        **pf,
        "address": f"{domain}:{rid >> 8:02x}:{rid >> 3 & 31:02x}.{rid & 7}",
        "device": host.read(f"{path}/sriov_vf_device"),
        "driver": "",
        "driver_override": "",
        "iommu_group": None,
        "physfn": pf["address"],
        "sriov": {},
        "netdevs": [],
        "blockdevs": [],
        "in_use": [],
        "users": [],
        "boot_critical": False,
    }
