# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a user may write about a microVM: templates expanded, and every option of an instance validated.

This module is private to the collection and imports nothing of Ansible. It looks at nothing of the host.
"""

from __future__ import annotations

import os
import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import (
    _early_init,
    _microvm_data,
    _network,
    _snapshot,
    _store,
    _vmm,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import WORD, derived
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size, parse_size

MIB = 1 << 20
SMALLEST_MEMORY = 96 * MIB
MEMORY = "256MiB"  # unless told otherwise
PLUGGABLE = 128 * MIB  # a block of Linux's memory hotplug
HUGEPAGES = (2 * MIB, 1 << 30)
RESTART_POLICIES = ("always", "on-failure", "never")
FILESYSTEMS = ("ext4", "xfs")
SHELL = ("IFS", "OLDPWD", "OPTIND", "PPID", "PWD")  # with a text as OPTIND, dash does not even start
PLACEHOLDER = re.compile(r"\{index(:0?\d{1,3}d)?\}")
SERIAL = re.compile(r"[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?")
PATH = re.compile(r"/[A-Za-z0-9_@%+=:,./-]+")
PCI = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
MOST = 10000

Item = t.Mapping[str, t.Any]


def expanded(instances: t.Sequence[Item]) -> t.Iterator[tuple[str, Item]]:
    """(option, item) of every microVM; an item with ``count`` is as many."""
    for index, item in enumerate(instances):
        option, name, count = f"instances[{index}]", item["name"], item.get("count")
        placeholders = len(PLACEHOLDER.findall(name))
        if count is None:
            if placeholders:
                raise Refused(f"{option}.name", name, "has {index} but no count", "Give count, or a name of its own")
            yield option, item
            continue
        if not 1 <= count <= MOST:
            raise Refused(f"{option}.count", count, f"not from 1 to {MOST}", "Leave count out for one microVM")
        if placeholders != 1 or "{" in PLACEHOLDER.sub("", name):
            raise Refused(
                f"{option}.name", name, "count makes several microVMs of this one name",
                "Write {index} into it once, such as agent-{index} or agent-{index:03d}",
            )  # fmt: skip
        _check_shareable(option, item, count)
        for number in range(1, count + 1):
            yield option, {**item, "name": name.format(index=number)}


def _check_shareable(option: str, item: Item, count: int) -> None:
    own = [(key, item.get(key)) for key in ("cid", "devices")]
    for number, attached in enumerate(item.get("networks") or ()):
        own += [(f"networks[{number}].{key}", attached.get(key)) for key in ("address", "address6", "mac")]
    for key, value in own:
        if value and count > 1:
            raise Refused(
                f"{option}.{key}", value, f"only one of {count} microVMs can have it",
                "Leave it out to have one derived, or declare that microVM as an item of its own",
            )  # fmt: skip


def wish(option: str, item: Item, networks: _network.Networks) -> dict[str, t.Any]:
    """One instance's options, validated and in the units of a spec."""
    if item["driver"] not in _vmm.DRIVERS:
        raise Refused(f"{option}.driver", item["driver"], "unknown driver", f"Use one of {', '.join(_vmm.DRIVERS)}")
    if item["restart_policy"] not in RESTART_POLICIES:
        raise Refused(
            f"{option}.restart_policy", item["restart_policy"], "unknown policy",
            f"Use one of {', '.join(RESTART_POLICIES)}",
        )  # fmt: skip
    if not WORD.fullmatch(item["tenant"]):
        raise Refused(f"{option}.tenant", item["tenant"], "not a name of a tenant", "Use 1 to 32 of a-z, 0-9 and _")
    cid = item["cid"]
    if cid is None:
        cid = 1024 + int.from_bytes(derived(item["name"], "cid")[:4], "big") % ((1 << 31) - 1024)
    if not 3 <= cid < 0xFFFFFFFF:
        raise Refused(f"{option}.cid", cid, "reserved by vsock", "Give 3 to 4294967294, or leave it out")
    found = {
        **{key: item[key] for key in ("name", "driver", "tenant", "autostart", "restart_policy", "thp")},
        "option": option,
        "cid": cid,
        **_vcpus(option, item),
        **_memory(option, item),
        "free_page_reporting": item["free_page_reporting"],
        **_boot(option, item),
        "environment": _environment(option, item["environment"]),
        "hotplug_slots": _slots(option, item["hotplug_slots"]),
        "data_images": _data_images(option, item["data_images"]),
        "volumes": _volumes(option, item["volumes"]),
        "shares": _shares(option, item["shares"]),
        "networks": networks.wishes(option, item["networks"]),
        "devices": _devices(option, item["devices"]),
        "rate_limits": _rate_limits(option, item["rate_limits"] or {}),
        "user_data": _microvm_data.archive(f"{option}.user_data", item["user_data"]) if item["user_data"] else "",
        **_snapshot.wish(option, item),
    }
    found["resources"] = _resources(option, item["resources"] or {}, found["memory_bytes"])
    _check_mounts(option, found)
    return found


# -- the machine ---------------------------------------------------------------


def _vcpus(option: str, item: Item) -> dict[str, int]:
    most = item["vcpus_max"] if item["vcpus_max"] is not None else item["vcpus"]
    for key, value in (("vcpus", item["vcpus"]), ("vcpus_max", most)):
        if not 1 <= value <= 255:
            raise Refused(f"{option}.{key}", value, "not from 1 to 255", "Give at least one virtual CPU")
    if most < item["vcpus"]:
        raise Refused(f"{option}.vcpus_max", most, f"less than vcpus ({item['vcpus']})", "Give at least vcpus")
    return {"vcpus": item["vcpus"], "vcpus_max": most}


def _memory(option: str, item: Item) -> dict[str, t.Any]:
    hugepage = parse_size(f"{option}.hugepages", item["hugepages"]) if item["hugepages"] else 0
    if hugepage and hugepage not in HUGEPAGES:
        raise Refused(f"{option}.hugepages", item["hugepages"], "not a size of huge pages", "Use 2MiB or 1GiB")
    if hugepage and item["snapshots"]:
        raise Refused(
            f"{option}.hugepages", item["hugepages"], "huge pages cannot be shared copy-on-write with clones",
            "Leave out one of hugepages and snapshots",
        )  # fmt: skip
    page = hugepage or MIB
    zones: list[_vmm.Zone] = []
    for index, zone in enumerate(item["memory_zones"]):
        where = f"{option}.memory_zones[{index}]"
        zones.append({"size_bytes": parse_size(f"{where}.size", zone["size"], page), "numa_node": zone["numa_node"]})
        _check_node(f"{where}.numa_node", zone["numa_node"])
    for key in ("memory", "numa_node") if zones else ():
        if item[key] is not None:
            raise Refused(f"{option}.{key}", item[key], "memory_zones say it already", "Leave out one of them")
    _check_node(f"{option}.numa_node", item["numa_node"])
    if not zones:
        size = parse_size(f"{option}.memory", item["memory"] or MEMORY, page)
        zones = [{"size_bytes": size, "numa_node": item["numa_node"]}]
    memory = sum(zone["size_bytes"] for zone in zones)
    if memory < SMALLEST_MEMORY:
        raise Refused(
            f"{option}.memory", format_size(memory), "too little for the guest kernel",
            f"Give at least {format_size(SMALLEST_MEMORY)}",
        )  # fmt: skip
    balloon = parse_size(f"{option}.balloon", item["balloon"], MIB) if item["balloon"] else 0
    if memory - balloon < SMALLEST_MEMORY:
        raise Refused(
            f"{option}.balloon", item["balloon"], f"leaves less than {format_size(SMALLEST_MEMORY)}",
            f"Give at most {format_size(memory - SMALLEST_MEMORY)}" if memory > SMALLEST_MEMORY else "Leave it out",
        )  # fmt: skip
    return {
        "memory_bytes": memory,
        "memory_max_bytes": _memory_max(option, item, memory, zones, max(hugepage, PLUGGABLE)),
        "memory_zones": zones,
        "hugepage_bytes": hugepage,
        "balloon_bytes": balloon,
    }


def _memory_max(option: str, item: Item, memory: int, zones: t.Sequence[_vmm.Zone], block: int) -> int:
    if not item["memory_max"]:
        return memory
    most = parse_size(f"{option}.memory_max", item["memory_max"], MIB)
    if most < memory:
        raise Refused(
            f"{option}.memory_max", item["memory_max"], f"less than memory ({format_size(memory)})",
            "Give at least memory",
        )  # fmt: skip
    if (most - memory) % block:
        raise Refused(
            f"{option}.memory_max", item["memory_max"],
            f"what can be plugged is not a multiple of {format_size(block)}",
            f"Give {format_size(memory + -(-(most - memory) // block) * block)}",
        )  # fmt: skip
    for key, value in (("memory_zones", zones[1:]), ("snapshots", item["snapshots"])):
        if value and most > memory:
            raise Refused(
                f"{option}.memory_max", item["memory_max"], f"memory cannot be plugged together with {key}",
                "Leave out one of them",
            )  # fmt: skip
    return most


def _check_node(option: str, node: int | None) -> None:
    if node is not None and node < 0:
        raise Refused(option, node, "not a NUMA node", "Give the number of one of the host's NUMA nodes")


def _image(option: str, written: str) -> str:
    """Name or digest of an image."""
    image = written.partition("sha256:")[2] or written
    if not (_store.NAME.fullmatch(image) or _store.DIGEST.fullmatch(image)):
        raise Refused(option, written, "neither a name nor a digest", "Name an image of image_store")
    return image


def _boot(option: str, item: Item) -> dict[str, t.Any]:
    image = "" if item["from_snapshot"] and not item["image"] else _image(f"{option}.image", item["image"])
    kernel = item["kernel"].partition("sha256:")[2] or item["kernel"]
    if kernel.startswith("/"):
        _check_path(f"{option}.kernel", kernel)
    elif kernel and not (_store.NAME.fullmatch(kernel) or _store.DIGEST.fullmatch(kernel)):
        raise Refused(
            f"{option}.kernel", item["kernel"], "neither a path nor an image's name or digest",
            "Name an image of image_store whose kernel is used, or give a kernel's path on the host",
        )  # fmt: skip
    for number, word in enumerate(item["kernel_arguments"]):
        if not re.fullmatch(r"[!-~]+", word):
            raise Refused(f"{option}.kernel_arguments[{number}]", word, "not one word", "Give one argument a list item")
    return {"image": image, "kernel": kernel, "kernel_arguments": list(item["kernel_arguments"])}


def _environment(option: str, environment: Item) -> dict[str, str]:
    found = {}
    for key, value in sorted(environment.items()):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key) or key.startswith("agentfleet_"):
            raise Refused(
                f"{option}.environment", key, "not a name of a variable", "Use letters, digits and _; not agentfleet_*"
            )
        if key in SHELL:
            raise Refused(f"{option}.environment", key, "a variable that each shell sets itself", "Use another name")
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise Refused(
                f"{option}.environment.{key}", value, "neither text nor a number",
                "Write in quotes what the guest shall see, or leave it out",
            )  # fmt: skip
        found[key] = f"{value}:{_early_init.SYSTEM_PATH}" if key == "PATH" else str(value)
    return found


# -- what is attached ------------------------------------------------------------


def _check_path(option: str, path: str) -> None:
    if not PATH.fullmatch(path) or os.path.normpath(path) != path:
        raise Refused(option, path, "not a clean absolute path", "Write a path such as /srv/models")


def _data_images(option: str, images: t.Sequence[Item]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for index, one in enumerate(images):
        where = f"{option}.data_images[{index}]"
        _check_path(f"{where}.target", one["target"])
        found.append({"image": _image(f"{where}.image", one["image"]), "target": one["target"]})
    return found


def _volumes(option: str, volumes: t.Sequence[Item]) -> list[_vmm.Volume]:
    found: list[_vmm.Volume] = []
    for index, volume in enumerate(volumes):
        where, name = f"{option}.volumes[{index}]", volume["name"]
        if not SERIAL.fullmatch(name) or name.startswith("agentfleet-"):
            raise Refused(
                f"{where}.name", name, "not a name of a volume",
                "Use 1 to 20 of a-z, 0-9 and inner hyphens, not beginning with agentfleet-",
            )  # fmt: skip
        if name in [other["name"] for other in found]:
            raise Refused(f"{where}.name", name, "named twice", "Give each volume of a microVM its own name")
        for key in ("template", "mount"):
            if volume[key]:
                _check_path(f"{where}.{key}", volume[key])
        found.append(_volume(where, volume))
    layers = [volume["name"] for volume in found if volume["writable_layer"]]
    if layers[1:]:
        raise Refused(
            f"{option}.volumes", layers[1], f"{layers[0]} has the writable layer already", "Set writable_layer once"
        )
    return found


def _volume(where: str, volume: Item) -> _vmm.Volume:
    if volume["readonly"] and not volume["template"]:
        raise Refused(f"{where}.readonly", True, "an empty volume that nobody can write", "Give it a template")
    for key in ("readonly", "mount") if volume["writable_layer"] else ():
        if volume[key]:
            raise Refused(
                f"{where}.{key}", volume[key], "the writable layer is below the root, and written",
                f"Leave out one of {key} and writable_layer",
            )  # fmt: skip
    used = volume["mount"] or volume["writable_layer"]
    filesystem = volume["filesystem"] or ("ext4" if used else "")
    allowed = ("ext4",) if volume["writable_layer"] else FILESYSTEMS
    if filesystem and filesystem not in allowed:
        raise Refused(
            f"{where}.filesystem", filesystem, "not one that guests make and mount", f"Use {' or '.join(allowed)}"
        )
    if filesystem and not used:
        raise Refused(
            f"{where}.filesystem", filesystem, "the guest makes none on a volume that it does not mount",
            "Give mount, or leave it out for a raw disk",
        )  # fmt: skip
    return {
        **t.cast(_vmm.Volume, {key: volume[key] for key in ("name", "readonly", "writable_layer")}),
        "size_bytes": parse_size(f"{where}.size", volume["size"], MIB),
        "template": volume["template"] or "",
        "mount": volume["mount"] or "",
        "filesystem": filesystem,
    }


def _shares(option: str, shares: t.Sequence[Item]) -> list[_vmm.Share]:
    found: list[_vmm.Share] = []
    for index, share in enumerate(shares):
        where = f"{option}.shares[{index}]"
        if not WORD.fullmatch(share["tag"]):
            raise Refused(f"{where}.tag", share["tag"], "not a tag", "Use 1 to 32 of a-z, 0-9 and _")
        if share["tag"] in [other["tag"] for other in found]:
            raise Refused(f"{where}.tag", share["tag"], "shared twice", "Give each share of a microVM its own tag")
        target = share["target"] or f"/mnt/{share['tag']}"
        for key, path in (("source", share["source"]), ("target", target)):
            _check_path(f"{where}.{key}", path)
        if share["dax"] not in ("never", "always"):
            raise Refused(f"{where}.dax", share["dax"], "unknown", "Use never or always")
        if share["cache"] not in _vmm.SHARE_CACHES:
            raise Refused(f"{where}.cache", share["cache"], "unknown", f"Use one of {', '.join(_vmm.SHARE_CACHES)}")
        keys = ("tag", "source", "readonly", "dax", "cache")
        found.append({**t.cast(_vmm.Share, {key: share[key] for key in keys}), "target": target})
    return found


def _check_mounts(option: str, found: Item) -> None:
    """Two things at one mount point would hide each other."""
    seen: dict[str, str] = {}
    kinds = (("data_images", "target", "image"), ("volumes", "mount", "name"), ("shares", "target", "tag"))
    for kind, key, name in kinds:
        for index, one in enumerate(found[kind]):
            target = one[key]
            if target and target in seen:
                raise Refused(
                    f"{option}.{kind}[{index}].{key}", target, f"{seen[target]} is mounted there",
                    "Give each its own mount point",
                )  # fmt: skip
            seen[target] = f"{kind[:-1].replace('_', ' ')} {one[name]}"


def _slots(option: str, slots: int) -> int:
    if not 0 <= slots <= 16:
        raise Refused(
            f"{option}.hotplug_slots", slots, "not from 0 to 16", "Give as many as are attached while it runs"
        )
    return slots


def _devices(option: str, devices: t.Sequence[str]) -> list[str]:
    found: list[str] = []
    for index, written in enumerate(devices):
        address = written.lower()
        if not PCI.fullmatch(address):
            raise Refused(f"{option}.devices[{index}]", written, "not a PCI address", "Write one such as 0000:41:00.0")
        if address in found:
            raise Refused(f"{option}.devices[{index}]", written, "given twice", "Give each device once")
        found.append(address)
    return found


def _rate_limits(option: str, limits: Item) -> _vmm.Limits:
    operations = limits.get("disk_operations_per_second") or 0
    if operations < 0:
        raise Refused(
            f"{option}.rate_limits.disk_operations_per_second", operations, "negative", "Leave it out for no limit"
        )
    sizes = {
        key: parse_size(f"{option}.rate_limits.{key}", limits[key]) if limits.get(key) else 0
        for key in ("disk_bytes_per_second", "network_bytes_per_second")
    }
    return {
        "disk_bytes_per_second": sizes["disk_bytes_per_second"],
        "disk_operations_per_second": operations,
        "network_bytes_per_second": sizes["network_bytes_per_second"],
    }


# Option -> least, most.
_RESOURCES = {
    "cpu_weight": (1, 10000),
    "cpu_quota_percent": (1, 100000),
    "io_weight": (1, 10000),
    "tasks_max": (16, 1 << 20),
}


def _resources(option: str, resources: Item, memory: int) -> dict[str, int]:
    found = {}
    for key, (least, most) in _RESOURCES.items():
        value = resources.get(key)
        if value is None:
            continue
        if not least <= value <= most:
            raise Refused(
                f"{option}.resources.{key}", value, f"not from {least} to {most}", "Leave it out for no limit"
            )
        found[key] = value
    if resources.get("memory_max"):
        found["memory_max_bytes"] = parse_size(f"{option}.resources.memory_max", resources["memory_max"], MIB)
        if found["memory_max_bytes"] < memory:
            raise Refused(
                f"{option}.resources.memory_max", resources["memory_max"],
                f"less than the guest's memory ({format_size(memory)}), so that the VMM would be killed",
                "Leave it out to have it reckoned",
            )  # fmt: skip
    return found
