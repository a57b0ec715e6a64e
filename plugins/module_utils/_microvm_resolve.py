# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From validated wishes and what a host has to specs: everything resolved, and everything that cannot be refused.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

import hashlib
import os
import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import _microvm_data, _network, _snapshot, _store, _vmm
from ansible_collections.agentfleet.metal.plugins.module_utils import _microvm_state as state_of
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import volume_path
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size

NODES = "/sys/devices/system/node"

Item = t.Mapping[str, t.Any]
Kind = tuple[int, t.Optional[int]]  # of memory: size of its huge pages, or 0, and the NUMA node that it is bound to
ANY: Kind = (0, None)


def observe(host: Host) -> dict[str, t.Any]:
    """What specs depend on."""
    return {
        "images": _store.stored(host),
        "names": _store.named(host),
        "memory_bytes": host.memory_bytes(),
        "nodes": {int(path.rpartition("node")[2]): _node_bytes(host, path) for path in host.glob(f"{NODES}/node*")},
        "virtualization": bool(re.search(r"^flags\s*:.*\b(vmx|svm)\b", host.read("/proc/cpuinfo"), re.M)),
        "landlock": _vmm.landlock(host),
    }


def _node_bytes(host: Host, path: str) -> int:
    found = re.search(r"MemTotal:\s+(\d+) kB", host.read(f"{path}/meminfo"))
    return int(found.group(1)) * 1024 if found else 0


class Resolver:
    """The specs of one call.

    :param params: ``state``, ``accelerator`` and ``memory_overcommit``
    :param wanted: name -> validated wish
    :param observed: what :func:`observe` returned, with ``specs``, ``units`` and ``enabled`` of all declared microVMs, and
        ``held``, the specs that microVMs run with and go on to run with
    :param predicting: what is missing is expected to be made by an earlier task
    :param warnings: takes what this means
    """

    def __init__(
        self,
        host: Host,
        params: Item,
        wanted: t.Mapping[str, Item],
        observed: Item,
        predicting: bool,
        warnings: list[str],
    ) -> None:
        self.host, self.params, self.wanted, self.observed = host, params, wanted, observed
        self.predicting, self.warnings = predicting, warnings
        self.others: dict[str, _vmm.Spec] = {n: s for n, s in observed["specs"].items() if n not in wanted}
        runs = params["state"] != "stopped"
        self.snapshots = _snapshot.Sources(host, predicting, warnings, self._counted().values(), runs)
        self.accelerator = self._accelerator()

    def specs(self, networks: _network.Networks) -> dict[str, _vmm.Spec]:
        """Name -> spec of every wanted microVM."""
        before = {name: spec["networks"] for name, spec in self.observed["specs"].items()}
        held: t.Mapping[str, _vmm.Spec] = self.observed["held"]
        interfaces = networks.resolve(
            self.wanted, before, [(name, one) for name, spec in held.items() for one in spec.get("networks", ())]
        )
        found = {name: self._spec(item, interfaces[name]) for name, item in self.wanted.items()}
        cids = {spec["cid"]: name for name, spec in [*held.items(), *self.others.items()]}
        devices = {device: name for name, spec in self.others.items() for device in spec.get("devices", ())}
        for name, spec in found.items():
            option = self.wanted[name]["option"]
            for one in _vmm.driver(spec["driver"]).unsupported(spec):
                raise Refused(f"{option}.{one.option}", one.value, one.problem, one.remedy)
            if cids.get(spec["cid"], name) != name:
                raise Refused(
                    f"{option}.cid", spec["cid"], f"microVM {cids[spec['cid']]} has it",
                    "Give another cid; one that a running microVM is to leave is free after its restart",
                )  # fmt: skip
            self._check_nodes(option, spec)
            self._check_devices(option, spec, devices)
            self._check_shares(option, spec)
            self._check_volumes(option, spec)
        self._check_memory(found)
        return found

    def _lacking(self, option: str, value: t.Any, problem: str, remedy: str) -> None:
        """Refuse what is not there; in check mode an earlier task may make it."""
        if not self.predicting:
            raise Refused(option, value, problem, remedy)
        self.warnings.append(f"{option}: {value}: {problem}; an earlier task is expected to correct it")

    # -- one spec --------------------------------------------------------------

    def _spec(self, item: Item, interfaces: list[_network.Interface]) -> _vmm.Spec:
        option = item["option"]
        digest = self._digest(f"{option}.image", item["image"]) if item["image"] else ""
        manifest = self.observed["images"].get(digest)
        before = self.observed["specs"].get(item["name"], {})
        kept = before.get("program", "") if before.get("driver") == item["driver"] else ""
        spec: _vmm.Spec = {
            "name": item["name"],
            "driver": item["driver"],
            "program": _vmm.driver(item["driver"]).program(self.host, kept),
            "accelerator": self.accelerator,
            "landlock": self.observed["landlock"],
            "tenant": item["tenant"],
            "image": item["image"],
            "image_digest": digest,
            "image_path": _store.image_path(digest),
            "image_bytes": manifest["files"][_store.IMAGE]["size_bytes"] if manifest else 0,
            "data_images": self._data_images(item, digest),
            **self._kernel(item, digest),  # type: ignore[typeddict-item]  # kernel, initrd, kernel_arguments
            "vcpus": item["vcpus"],
            "vcpus_max": item["vcpus_max"],
            "memory_bytes": item["memory_bytes"],
            "memory_max_bytes": item["memory_max_bytes"],
            "memory_zones": item["memory_zones"],
            "memory_file": "",
            "hugepage_bytes": item["hugepage_bytes"],
            "thp": item["thp"],
            "balloon_bytes": item["balloon_bytes"],
            "free_page_reporting": item["free_page_reporting"],
            "cid": item["cid"],
            "config": "",
            "data": f"data-{_digest_of(item['user_data'])}" if item["user_data"] else "",
            "hotplug_slots": item["hotplug_slots"],
            "volumes": item["volumes"],
            "shares": item["shares"],
            "networks": interfaces,
            "devices": item["devices"],
            "rate_limits": item["rate_limits"],
            "environment": item["environment"],
            "resources": item["resources"],
            "autostart": item["autostart"],
            "restart_policy": item["restart_policy"],
            "restore_from": "",
        }
        self.snapshots.settle(item, spec)
        spec["config"] = f"config-{_digest_of(_microvm_data.config(spec))}"
        return spec

    def _accelerator(self) -> str:
        wish: str = self.params["accelerator"]
        if wish == "kvm" and not self.observed["virtualization"]:
            raise Refused(
                "accelerator", wish, "this host's CPU has no vmx or svm",
                "Enable virtualization in the firmware, or use tcg",
            )  # fmt: skip
        # /dev/kvm alone proves nothing: it can exist and still not run an ordinary guest.
        return ("kvm" if self.observed["virtualization"] else "tcg") if wish == "auto" else wish

    def _digest(self, option: str, image: str) -> str:
        digest = self.observed["names"].get(image, image)
        if digest in self.observed["images"]:
            return str(digest)
        if self.predicting:
            self.warnings.append(f"image {image} is not on the host yet; an earlier task is expected to bring it")
            return ""
        raise Refused(
            option, image, "not in the host's image store",
            f"Bring it with image_store first (there: {', '.join(sorted(self.observed['names'])) or 'none'})",
        )  # fmt: skip

    def _data_images(self, item: Item, root: str) -> list[_vmm.DataImage]:
        found: list[_vmm.DataImage] = []
        for index, one in enumerate(item["data_images"]):
            option = f"{item['option']}.data_images[{index}].image"
            digest = self._digest(option, one["image"])
            if digest and digest in [root, *(other["digest"] for other in found)]:
                raise Refused(option, one["image"], "the microVM has it already", "Attach an image once")
            manifest = self.observed["images"].get(digest, {})
            content = manifest.get("definition", {})
            found.append(
                {
                    "digest": digest,
                    "path": _store.image_path(digest),
                    "size_bytes": manifest["files"][_store.IMAGE]["size_bytes"] if manifest else 0,
                    "uuid": manifest.get("definition_digest", "")[:32],  # as the build gives it
                    "target": one["target"],
                    "filesystem": content.get("filesystem", "erofs"),
                    "options": _store.mount_options(content),
                }
            )
        return found

    def _kernel(self, item: Item, digest: str) -> dict[str, t.Any]:
        """Kernel and initramfs: the image's own, another image's, or a file that needs no initramfs."""
        option, wish, images = f"{item['option']}.kernel", item["kernel"], self.observed["images"]
        path = wish if wish.startswith("/") else ""
        if path and not self.host.exists(path):
            self._lacking(option, path, "no such file on the host", "Bring the kernel there first")
        holder = self._digest(option, wish) if wish and not path else digest
        for key, one in (("image", digest), ("kernel", holder)):
            if images.get(one, {}).get("definition", {}).get("data"):
                raise Refused(
                    f"{item['option']}.{key}", item[key], "an image of data, which has no kernel",
                    "Name it in data_images, beside the image of a root",
                )  # fmt: skip
        initrd = "" if path or not _has_initrd(images.get(holder)) else _store.image_path(holder, _store.INITRD)
        own: list[str] = []
        if digest in images:
            # An initramfs has in itself how to mount its image; a kernel without one is told by the image that it mounts.
            own = [] if initrd else images[digest].get("kernel_arguments", [])
            if wish and not initrd and not own:
                raise Refused(
                    option, wish, f"has no initramfs, and image {item['image']} does not start without one",
                    "Build the image with kernel_source, or name an image whose kernel has an initramfs",
                )  # fmt: skip
            if wish and initrd and _mounted(images[digest]) != _mounted(images.get(holder, images[digest])):
                raise Refused(
                    option, wish, f"its initramfs mounts {wish}, in another way than {item['image']} is mounted",
                    "Name an image with the same filesystem and dax, and without verity, or one built with kernel_source",
                )  # fmt: skip
        return {
            "kernel": path or _store.image_path(holder, _store.KERNEL),
            "initrd": initrd,
            "kernel_arguments": [*own, *item["kernel_arguments"]],
        }

    # -- what the host must have -------------------------------------------------

    def _check_nodes(self, option: str, spec: _vmm.Spec) -> None:
        for zone in spec["memory_zones"]:
            node = zone["numa_node"]
            if node is not None and not self.observed["nodes"].get(node):
                there = ", ".join(str(number) for number, size in sorted(self.observed["nodes"].items()) if size)
                self._lacking(
                    f"{option}.numa_node", node, "the host has no such NUMA node with memory",
                    f"Use one of {there or 'none'}",
                )  # fmt: skip

    def _check_devices(self, option: str, spec: _vmm.Spec, holders: dict[str, str]) -> None:
        for index, address in enumerate(spec["devices"]):
            where = f"{option}.devices[{index}]"
            if address in holders:
                raise Refused(where, address, f"microVM {holders[address]} has it", "Give each microVM its own devices")
            holders[address] = spec["name"]
            directory = f"/sys/bus/pci/devices/{address}"
            bound = self.host.link_name(f"{directory}/driver")
            if not self.host.exists(directory):
                self._lacking(where, address, "the host has no such PCI device", "See lspci -D")
            elif bound != "vfio-pci":
                self._lacking(
                    where, address, f"in use by the driver {bound}" if bound else "bound to no driver",
                    "Bind it to vfio-pci with the module vfio_bind",
                )  # fmt: skip

    def _check_shares(self, option: str, spec: _vmm.Spec) -> None:
        for index, share in enumerate(spec["shares"]):
            if not os.path.isdir(self.host.path(share["source"])):
                self._lacking(
                    f"{option}.shares[{index}].source", share["source"], "no such directory on the host",
                    "Make the directory first",
                )  # fmt: skip
        if spec["shares"] and not self.host.exists(_vmm.VIRTIOFSD):
            self._lacking(
                f"{option}.shares", ", ".join(share["tag"] for share in spec["shares"]),
                f"the host has no {_vmm.VIRTIOFSD}", "Install it with the role agentfleet.metal.virtiofsd",
            )  # fmt: skip

    def _check_volumes(self, option: str, spec: _vmm.Spec) -> None:
        before = self.observed["specs"].get(spec["name"], {})
        made = {volume["name"] for volume in before.get("volumes", ())}
        for index, volume in enumerate(spec["volumes"]):
            where, size = f"{option}.volumes[{index}]", volume["size_bytes"]
            path = volume_path(spec["name"], volume["name"])
            has = size_of(self.host, path)
            if has is None and volume["name"] in made:  # a guest would go on with an empty one
                self._lacking(
                    f"{where}.name", volume["name"], f"it was made before, and {path} is not there",
                    "Mount what it is on, or bring the file back; for an empty one, first declare the microVM without it",
                )  # fmt: skip
                continue
            if has is not None and has > size:
                raise Refused(
                    f"{where}.size", format_size(size), f"the volume has {format_size(has)}, and data may be at its end",
                    f"Volumes only grow: give at least {format_size(has)}, or another name for a new one",
                )  # fmt: skip
            if not volume["template"] or has is not None:
                continue
            template = size_of(self.host, volume["template"])
            if template is None:
                self._lacking(
                    f"{where}.template", volume["template"], "no such file on the host", "Bring it there first"
                )
            elif template > size:
                raise Refused(
                    f"{where}.size", format_size(size), f"its template has {format_size(template)}",
                    f"Give at least {format_size(template)}",
                )  # fmt: skip

    def _counted(self) -> dict[str, _vmm.Spec]:
        """The microVMs of the host that are not of this call, and take memory: they run, or will after a reboot."""
        return {
            name: spec
            for name, spec in self.others.items()
            if name in self.observed["enabled"]
            or state_of.public_state(self.observed["units"].get(name)) not in ("stopped", "failed")
        }

    def _check_memory(self, found: t.Mapping[str, _vmm.Spec]) -> None:
        """Each kind of memory for itself: all of it, the pages of each huge size, and either of each node that is bound to."""
        if not self.observed["memory_bytes"]:
            return
        room = {ANY: int(self.observed["memory_bytes"] * self.params["memory_overcommit"])}
        used: dict[Kind, int] = {}
        for spec in self._counted().values():
            for kind, size in _demands(spec):
                used[kind] = used.get(kind, 0) + size
        for name, spec in found.items():
            for kind, size in _demands(spec):
                used[kind] = used.get(kind, 0) + size
                if kind not in room:
                    room[kind] = self._room(kind)
                if used[kind] > room[kind] and not (self.predicting and kind != ANY):
                    raise Refused(
                        f"{self.wanted[name]['option']}.memory", format_size(size),
                        f"does not fit: the microVMs up to {name} take {used[kind] >> 20} MiB of {room[kind] >> 20} MiB"
                        + _of(kind),
                        f"Declare fewer or smaller microVMs{_instead(kind)}",
                    )  # fmt: skip

    def _room(self, kind: Kind) -> int:
        page, node = kind
        if not page:
            return int(self.observed["nodes"].get(node, 0))
        where = "/sys/kernel/mm" if node is None else f"{NODES}/node{node}"
        return page * (self.host.read_int(f"{where}/hugepages/hugepages-{page >> 10}kB/nr_hugepages") or 0)


def _demands(spec: _vmm.Spec) -> list[tuple[Kind, int]]:
    """(kind of memory, bytes) that a microVM takes."""
    page = spec.get("hugepage_bytes", 0)
    bound = [zone for zone in spec.get("memory_zones", ()) if zone["numa_node"] is not None]
    return [((page, None), spec["memory_bytes"]), *(((page, zone["numa_node"]), zone["size_bytes"]) for zone in bound)]


def _of(kind: Kind) -> str:
    page, node = kind
    pages = f" in huge pages of {format_size(page)}" if page else ""
    return pages if node is None else f"{pages} on NUMA node {node}"


def _instead(kind: Kind) -> str:
    page, node = kind
    there = "" if node is None else " there"
    return f", or reserve more huge pages{there}" if page else there or ", or raise memory_overcommit"


def _has_initrd(manifest: Item | None) -> bool:
    """Whether an image's kernel has an initramfs; it is taken for one that has where the image is not there yet."""
    return manifest is None or _store.INITRD in manifest["files"]


def _mounted(manifest: Item) -> tuple[str, str, str]:
    """How an image is mounted: its file system, the options, and the device-mapper table of its verity."""
    content = manifest.get("definition", {})
    return content.get("filesystem", "erofs"), _store.mount_options(content), manifest.get("verity", "")


def size_of(host: Host, path: str) -> int | None:
    """A file's size, or None when there is none."""
    try:
        return os.stat(host.path(path)).st_size
    except OSError:
        return None


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
