# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How many microVMs a host can take, and why: every byte that is counted is a line with its reason.

This module is private to the collection and imports nothing of Ansible. It
runs on the controller, on facts; it looks at no host.

A page is counted where it is held. Pages of an image are held once, in the
host's page cache. What a microVM holds alone is its RAM, the VMM's own memory
and the page tables that map RAM and image; the guest kernel's page structs for
the image are inside the guest's RAM and take from what its programs can use.
"""

from __future__ import annotations

import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import NAME
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size, parse_size

PAGE = 4 << 10
ENTRY = 8  # bytes of a page table entry: it maps one page
STRUCT_PAGE = 64  # bytes of the kernel's description of one page, on all 64-bit architectures that are used here
# Of an image that all guests read, for each further one: benchmarks/results/density.txt. 1.56 % are page structs and 0.39 %
# page tables, as calculated below; the rest is counted as what it was measured to be.
IMAGE_MEASURED = 0.0239
IMAGE_REST = IMAGE_MEASURED - (STRUCT_PAGE + 2 * ENTRY) / PAGE
TOLERANCE = 0.05  # by which what runs may exceed its plan that still holds: THP, the moment of the measurement
KERNEL_BYTES = 48 << 20  # of a guest's RAM: the distribution's kernel, its tables, the agent
# What a process holds besides guest RAM and image: its heap, stacks, copies of its libraries' data, and the host
# kernel's objects for it (threads, vhost rings, cgroup). Policy may give other figures; benchmarks/density measures.
VMM_BYTES = {"qemu": 40 << 20, "cloud_hypervisor": 16 << 20}
EMULATION_BYTES = 32 << 20  # translated code of QEMU without KVM
VIRTIOFSD_BYTES = 8 << 20
POLICY = {"reserve": "512MiB", "overcommit": 1.0, "placement": "all", "accelerator": "kvm"}
PLACEMENTS = {
    "all": "RAM goes to nodes with CPUs first, then to slower ones (CXL)",
    "cpu": "RAM goes to nodes with CPUs alone",
}
Line = dict[str, t.Any]
PLACEHOLDER = re.compile(r"\{index(:0?\d{1,3}d)?\}")  # of an instance with count


def line(scope: str, what: str, size: int, why: str) -> Line:
    """One counted thing. Its scope is ``host`` (once), ``instance`` (each) or ``guest`` (inside the RAM of each)."""
    return {"scope": scope, "what": what, "bytes": size, "why": why}


def pages(size: int) -> int:
    """Number of ordinary pages."""
    return -(-size // PAGE)


def struct_pages(size: int) -> int:
    """What a kernel needs to describe this much memory: 1.6 % of it."""
    return pages(size) * STRUCT_PAGE


def page_tables(size: int, page: int = PAGE) -> int:
    """What one level of tables needs to map this much memory."""
    return -(-size // page) * ENTRY


# -- what is wished: validation ------------------------------------------------


def policy_of(given: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """The policy with its defaults, in bytes and numbers."""
    unknown = sorted(set(given) - set(POLICY) - {"vmm", "virtiofsd"})
    if unknown:
        raise Refused(
            f"policy.{unknown[0]}", given[unknown[0]], "not a part of the policy",
            f"Use {', '.join([*POLICY, 'vmm', 'virtiofsd'])}",
        )  # fmt: skip
    policy = {**POLICY, **{key: value for key, value in given.items() if value is not None}}
    for key in ("reserve", "vmm", "virtiofsd"):
        if key in policy:
            policy[key] = parse_size(f"policy.{key}", policy[key])
    overcommit = policy["overcommit"]
    if isinstance(overcommit, bool) or not isinstance(overcommit, (int, float)) or not 1 <= overcommit <= 16:
        raise Refused(
            "policy.overcommit", overcommit, "not a number from 1 to 16", "1.0 counts all guest RAM, 2.0 half of it"
        )
    for key, choices in (("placement", tuple(PLACEMENTS)), ("accelerator", ("kvm", "tcg"))):
        if policy[key] not in choices:
            raise Refused(f"policy.{key}", policy[key], "not known", f"Use one of {', '.join(choices)}")
    return policy


def wish_of(
    option: str,
    item: t.Any,
    images: t.Mapping[str, int],
    nodes: t.Mapping[int, t.Any],
    snapshots: t.Mapping[str, t.Mapping[str, t.Any]],
) -> dict[str, t.Any]:
    """One kind of microVM, validated; the options are those of the module microvm."""
    if not hasattr(item, "items"):
        raise Refused(option, item, "not a dictionary", "Give the options that the module microvm takes")
    name = str(item.get("name", ""))
    if not NAME.fullmatch(PLACEHOLDER.sub("1", name)):
        raise Refused(f"{option}.name", name, "not a name of a microVM", "Use 1 to 48 of a-z, 0-9 and hyphen")
    driver = item.get("driver", "qemu")
    if driver not in VMM_BYTES:
        raise Refused(f"{option}.driver", driver, "unknown driver", f"Use one of {', '.join(VMM_BYTES)}")
    count = item.get("count")
    count = 1 if count is None else count
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise Refused(f"{option}.count", count, "not a number of microVMs", "Give 1 or more")
    source = item.get("from_snapshot") or ""
    if source:
        if source not in snapshots:
            raise Refused(
                f"{option}.from_snapshot", source, "nothing is known of it",
                f"Give it in snapshots (there: {', '.join(sorted(snapshots)) or 'none'})",
            )  # fmt: skip
        made_of = snapshots[source]
        item = {
            **item,
            "memory": made_of["memory_bytes"],
            "image": made_of["image_digest"],
            "driver": made_of["driver"],
        }
        driver = item["driver"]
    zones = _zones(option, item, nodes)
    memory = sum(size for size, _node in zones)
    balloon = parse_size(f"{option}.balloon", item["balloon"], 1 << 20) if item.get("balloon") else 0
    mapped = {f"{option}.image": str(item.get("image", ""))}
    for number, one in enumerate(item.get("data_images") or ()):
        mapped[f"{option}.data_images[{number}].image"] = str(one.get("image", ""))
    for where, image in mapped.items():
        if image not in images:
            raise Refused(
                where, image, "its size is not known",
                f"Give it in images (there: {', '.join(sorted(images)) or 'none'})",
            )  # fmt: skip
    hugepages = parse_size(f"{option}.hugepages", item["hugepages"]) if item.get("hugepages") else 0
    if hugepages and memory % hugepages:
        raise Refused(
            f"{option}.memory", item.get("memory"), f"not a multiple of the hugepages of {format_size(hugepages)}",
            f"Give a multiple of {format_size(hugepages)}",
        )  # fmt: skip
    wish = {
        "name": name, "driver": driver, "count": count, "memory": memory, "images": list(mapped.values()), "hugepages": hugepages,
        "zones": zones, "balloon": balloon, "from_snapshot": source, "shares": len(item.get("shares") or ()),
        "pinned": bool(item.get("devices")),
        "volumes": sum(
            parse_size(f"{option}.volumes[{number}].size", volume.get("size"))
            for number, volume in enumerate(item.get("volumes") or ())
        ),
    }  # fmt: skip
    inside = sum(one["bytes"] for one in guest_lines(wish, images))
    if inside >= memory - balloon:
        raise Refused(
            f"{option}.memory", format_size(memory),
            f"the guest's kernel and its page structs for {', '.join(mapped.values())} take {inside >> 20} MiB of it",
            f"Give more than {format_size((inside >> 20) + 1 << 20)}, or serve rarely used data by a share",
        )  # fmt: skip
    return wish


def _zones(option: str, item: t.Mapping[str, t.Any], nodes: t.Mapping[int, t.Any]) -> list[tuple[int, int | None]]:
    """(size, node) of each part of guest RAM; a node of None is any."""
    zones = []
    for where, node in [("numa_node", item.get("numa_node"))] + [
        (f"memory_zones[{number}].numa_node", zone.get("numa_node"))
        for number, zone in enumerate(item.get("memory_zones") or ())
    ]:
        if node is not None and node not in nodes:
            raise Refused(
                f"{option}.{where}", node, "the host has no such node with memory",
                f"Use one of {', '.join(map(str, nodes))}",
            )  # fmt: skip
    for number, zone in enumerate(item.get("memory_zones") or ()):
        size = parse_size(f"{option}.memory_zones[{number}].size", zone.get("size"), 1 << 20)
        zones.append((size, zone.get("numa_node")))
    if zones and item.get("memory"):
        raise Refused(f"{option}.memory", item["memory"], "memory_zones say it already", "Leave out one of them")
    return zones or [(parse_size(f"{option}.memory", item.get("memory") or "256MiB", 1 << 20), item.get("numa_node"))]


# -- what is counted -------------------------------------------------------------


def _mapped(wish: t.Mapping[str, t.Any], images: t.Mapping[str, int]) -> int:
    """Size of all images that one microVM maps."""
    return sum(images[name] for name in wish["images"])


def guest_lines(wish: t.Mapping[str, t.Any], images: t.Mapping[str, int]) -> list[Line]:
    """What is inside a guest's RAM before its programs get any."""
    memory, image = wish["memory"], _mapped(wish, images)
    return [
        line("guest", "kernel and agent", KERNEL_BYTES, "code, data and tables of a distribution's kernel once booted"),
        line("guest", "page structs of its RAM", struct_pages(memory), "64 bytes for each 4 KiB page"),
        line(
            "guest", "page structs of its image", struct_pages(image),
            f"64 bytes for each 4 KiB page of device memory: 1.6 % of {format_size(image)}, made when the guest boots",
        ),
    ]  # fmt: skip


def instance_lines(
    wish: t.Mapping[str, t.Any], images: t.Mapping[str, int], policy: t.Mapping[str, t.Any]
) -> list[Line]:
    """What the host holds for each microVM of one kind. ``movable`` lines may be on any node, others need DRAM."""
    memory, image = wish["memory"], _mapped(wish, images)
    overcommit = 1.0 if wish["hugepages"] or wish["pinned"] else policy["overcommit"]
    floor = sum(one["bytes"] for one in guest_lines(wish, images))
    counted = max(int((memory - wish["balloon"]) / overcommit), floor)
    if wish["hugepages"]:
        why = f"from the host's pool of {format_size(wish['hugepages'])} pages: all of it, whatever the policy"
    elif wish["pinned"]:
        why = "pinned, since the device may write anywhere in it: all of it, whatever the policy"
    elif wish["from_snapshot"] and counted == memory:
        why = "all of it may be written; what a clone does not write it shares with the snapshot"
    elif counted == memory:
        why = "all of it may be touched"
    elif counted == memory - wish["balloon"]:
        why = "all of it may be touched, but for what the balloon leaves to the host"
    else:
        why = f"{format_size(memory)} overcommitted {overcommit:g} times, at least what a booted guest holds"
    kvm = policy["accelerator"] == "kvm"
    tables = page_tables(memory, wish["hugepages"] or PAGE) + page_tables(image)
    found = [
        {**line("instance", "guest RAM", counted, why), "movable": not wish["pinned"]},
        line(
            "instance", f"VMM ({wish['driver']})", policy.get("vmm") or VMM_BYTES[wish["driver"]],
            "heap, stacks and kernel objects of one process (policy.vmm; benchmarks/density measures it)",
        ),
        line(
            "instance", "page tables", tables * (2 if kvm else 1),
            "8 bytes for each 4 KiB page of RAM and image in the VMM"
            + (" and again in KVM's second dimension" if kvm else ""),
        ),
        line(
            "instance", "rest for its image", int(image * IMAGE_REST),
            f"page cache and kernel objects: with page structs and page tables, {IMAGE_MEASURED:.2%} of the image were measured "
            "(benchmarks/density)",
        ),
    ]  # fmt: skip
    if not kvm:
        found.append(line("instance", "translated code", EMULATION_BYTES, "the host has no KVM: QEMU emulates"))
    if wish["shares"]:
        size = policy.get("virtiofsd") or VIRTIOFSD_BYTES
        found.append(line("instance", "virtiofsd", wish["shares"] * size, f"{wish['shares']} share(s), a process each"))
    return found


def host_lines(
    wishes: t.Sequence[t.Mapping[str, t.Any]],
    images: t.Mapping[str, int],
    snapshots: t.Mapping[str, t.Mapping[str, t.Any]],
    reserve: int,
) -> list[Line]:
    """What the host holds once, however many microVMs run."""
    used = sorted({name for wish in wishes for name in wish["images"]})
    sources = sorted({wish["from_snapshot"] for wish in wishes if wish["from_snapshot"]})
    return [
        line("host", "reserve", reserve, "the host's own kernel, services and page cache (policy.reserve)"),
        *(
            {
                **line("host", f"image {name}", images[name], "once in the host's page cache, mapped by every guest"),
                "movable": True,
            }
            for name in used
        ),
        *(
            {
                **line(
                    "host", f"snapshot {name}", snapshots[name]["disk_bytes"], "once in the page cache, for all clones"
                ),
                "movable": True,
            }
            for name in sources
        ),
    ]


# -- where it goes -----------------------------------------------------------------


class Nodes:
    """The host's memory while it fills.

    Page tables, the VMM's kernel objects and pinned RAM cannot be in ZONE_MOVABLE, which is where CXL memory is
    onlined. Guest RAM and page cache can, and the kernel moves them there (demotion) when DRAM is short: RAM that is
    bound to no node is therefore only a sum that has to fit into what the others leave.
    """

    def __init__(self, facts: t.Mapping[str, t.Any], placement: str) -> None:
        found = [node for node in facts["numa"]["nodes"] if node["size_bytes"]]
        found.sort(key=lambda node: (not node["cpus"], node["id"]))  # where the kernel allocates first
        self.kinds = {node["id"]: "cpu" if node["cpus"] else "slow" for node in found}
        self.open = [number for number, kind in self.kinds.items() if placement == "all" or kind == "cpu"]
        self.pools = {
            node["id"]: {
                size: size * count["total"]
                for name, count in node.get("hugepages", {}).items()
                for size in [int(name[: -len("kB")]) << 10]
            }
            for node in found
        }
        self.size = {node["id"]: max(0, node["size_bytes"] - sum(self.pools[node["id"]].values())) for node in found}
        self.left = dict(self.size)  # without the memory that is bound to no node
        self.normal = {
            node["id"]: max(0, min(self.size[node["id"]], self.size[node["id"]] - node.get("movable_bytes", 0)))
            for node in found
        }
        self.loose = 0

    def copy(self) -> Nodes:
        """The same state, to try something on."""
        other = object.__new__(Nodes)
        other.__dict__ = {**self.__dict__, "left": dict(self.left), "normal": dict(self.normal)}
        other.pools = {number: dict(pool) for number, pool in self.pools.items()}
        return other

    def take(self, size: int, movable: bool, node: int | None = None, page: int = 0) -> str:
        """Take memory; empty, or what is exhausted.

        :param node: take it from this one alone
        :param page: size of the hugepages that it is made of, or 0
        """
        names = list(self.kinds) if node is None else [node]
        if page:
            for name in names:
                part = min(size, self.pools[name].get(page, 0))
                self.pools[name][page] = self.pools[name].get(page, 0) - part
                size -= part
            what = f"hugepages of {format_size(page)}"
        elif movable and node is None:
            names, what = self.open, "memory"
            self.loose, size = self.loose + size, 0
        else:
            what = "memory" if movable else "memory outside movable zones"
            for name in names:
                part = min(size, self.left[name], self.left[name] if movable else self.normal[name])
                self.left[name] -= part
                self.normal[name] -= 0 if movable else part
                size -= part
        if not size and self.loose > sum(self.left[name] for name in self.open):
            size, names, what = self.loose, self.open, "memory"
        return f"{what} on node{'s' * (len(names) > 1)} {', '.join(map(str, names)) or '(none)'}" if size else ""

    def free(self) -> dict[int, int]:
        """What is left of each node when the kernel has put unbound memory on the first ones."""
        loose, found = self.loose, {}
        for name, left in self.left.items():
            part = min(loose, left) if name in self.open else 0
            loose, found[name] = loose - part, left - part
        return found


def _place(nodes: Nodes, wish: t.Mapping[str, t.Any], lines: t.Sequence[Line]) -> str:
    ram = next(one for one in lines if one["what"] == "guest RAM")
    fixed = sum(one["bytes"] for one in lines if one is not ram)
    full = nodes.take(fixed, movable=False)
    for size, node in wish["zones"]:
        part = size * ram["bytes"] // wish["memory"] if not wish["hugepages"] else size
        full = full or nodes.take(part, ram["movable"], node, wish["hugepages"])
    return full


def plan(
    facts: t.Any,
    instances: t.Any,
    images: t.Any,
    policy: t.Mapping[str, t.Any] | None = None,
    measured: t.Sequence[t.Mapping[str, t.Any]] | None = None,
    snapshots: t.Sequence[t.Mapping[str, t.Any]] = (),
) -> dict[str, t.Any]:
    """How many of the instances fit, how many more of the last kind, and every line of the sum.

    :param facts: ``ansible_facts.metal`` of the host
    :param instances: as the module microvm takes them
    :param images: name or digest to size in bytes
    :param policy: ``reserve, overcommit, placement, accelerator, vmm, virtiofsd``
    :param measured: ``instances`` of the module microvm_info, to compare with
    :param snapshots: ``snapshots`` of the module microvm_snapshot, for instances with ``from_snapshot``
    """
    chosen = policy_of(policy or {})
    for name, value, keys in (("facts", facts, ("numa", "os")), ("images", images, ())):
        if not hasattr(value, "items") or any(key not in value for key in keys):
            raise Refused(name, type(value).__name__, "not what is expected", "Collect them with host_facts")
    sizes = {str(name): parse_size(f"images.{name}", size) for name, size in images.items()}
    nodes = Nodes(facts, chosen["placement"])
    if not nodes.kinds:
        raise Refused("facts.numa.nodes", [], "no node has memory", "Collect them with host_facts")
    if not isinstance(instances, (list, tuple)) or not instances:
        raise Refused("instances", instances, "no list of microVMs", "Give at least one")
    sources = {str(one["name"]): one for one in snapshots}
    wishes = [wish_of(f"instances[{n}]", item, sizes, nodes.left, sources) for n, item in enumerate(instances)]
    shared = host_lines(wishes, sizes, sources, chosen["reserve"])
    disk = int(facts["os"].get("free_bytes", {}).get("/var/lib", 0))
    kinds = [(wish, instance_lines(wish, sizes, chosen)) for wish in wishes]
    for one in shared:
        # The reserve is kernel memory of the host, so it is on nodes with CPUs; an image may be anywhere.
        full = nodes.take(one["bytes"], one.get("movable", False))
        if full:
            return _outcome(nodes, kinds, shared, sizes, 0, 0, f"{one['what']}: no {full}", measured, disk)
    fitting, limit, volumes = 0, "", 0
    for wish, lines in kinds:
        for _number in range(wish["count"]):
            limit = _fits(nodes, wish, lines, disk - volumes)
            if limit:
                return _outcome(nodes, kinds, shared, sizes, fitting, 0, limit, measured, disk - volumes)
            fitting, volumes = fitting + 1, volumes + wish["volumes"]
    trial, more, wish, lines = nodes.copy(), 0, *kinds[-1]
    left = disk - volumes
    while not limit:
        limit = _fits(trial, wish, lines, left)
        more, left = (more, left) if limit else (more + 1, left - wish["volumes"])
    return _outcome(nodes, kinds, shared, sizes, fitting, more, limit, measured, disk - volumes)


def _fits(nodes: Nodes, wish: t.Mapping[str, t.Any], lines: t.Sequence[Line], disk: int) -> str:
    """Place one microVM; empty, or what stands against it (then nothing is taken)."""
    if wish["volumes"] > max(0, disk):
        return f"one more {wish['name']}: no space for its volumes below /var/lib"
    trial = nodes.copy()
    full = _place(trial, wish, lines)
    if full:
        return f"one more {wish['name']}: no {full}"
    nodes.__dict__.update(trial.__dict__)
    return ""


def _outcome(
    nodes: Nodes,
    kinds: t.Sequence[tuple[t.Mapping[str, t.Any], list[Line]]],
    shared: list[Line],
    sizes: t.Mapping[str, int],
    fitting: int,
    more: int,
    limit: str,
    measured: t.Sequence[t.Mapping[str, t.Any]] | None,
    disk: int,
) -> dict[str, t.Any]:
    declared = sum(wish["count"] for wish, _lines in kinds)
    found = {
        "declared": declared,
        "fits": fitting == declared,
        "fitting": fitting,
        "more": more,
        "limit": limit,
        "host": shared,
        "instances": [
            {
                "name": wish["name"],
                "count": wish["count"],
                "bytes": sum(one["bytes"] for one in lines),
                "usable_bytes": wish["memory"] - sum(one["bytes"] for one in guest_lines(wish, sizes)),
                "volume_bytes": wish["volumes"],
                "lines": lines + guest_lines(wish, sizes),
            }
            for wish, lines in kinds
        ],
        "nodes": [
            {
                "id": number,
                "kind": nodes.kinds[number],
                "size_bytes": nodes.size[number],
                "free_bytes": left,
            }
            for number, left in nodes.free().items()
        ],
        "disk_free_bytes": disk,
    }
    if measured is not None:
        found["comparison"] = compare(kinds, sizes, measured)
        found["holds"] = all(one["holds"] for one in found["comparison"])
    found["text"] = text_of(found)
    return found


# -- compared with what is, and told ---------------------------------------------------


def compare(
    kinds: t.Sequence[tuple[t.Mapping[str, t.Any], list[Line]]],
    images: t.Mapping[str, int],
    measured: t.Sequence[t.Mapping[str, t.Any]],
) -> list[dict[str, t.Any]]:
    """The plan for those of each kind that run, beside what microvm_info measured of them, and whether it holds.

    It is about all of a kind together, since overcommit counts on some that need less than others.
    """
    found = []
    for wish, lines in kinds:
        names = {wish["name"].format(index=number + 1) for number in range(wish["count"])}
        ours = [one for one in measured if one.get("pid") and one.get("name") in names]
        if not ours:
            continue
        ram, vmm = (
            len(ours) * sum(entry["bytes"] for entry in lines if entry["what"].startswith(parts))
            for parts in (("guest RAM",), ("VMM", "translated code"))
        )
        of = f"of {len(ours)} x {wish['name']}"
        for what, planned, taken in (
            (f"guest RAM {of}", ram, sum(int(one["guest_ram_bytes"]) for one in ours)),
            (f"VMM {of}", vmm, sum(int(one["overhead_bytes"]) for one in ours)),
            (f"images {of}, once", _mapped(wish, images), max(int(one["shared_bytes"]) for one in ours)),
        ):
            holds = taken <= planned * (1 + TOLERANCE)
            found.append({"what": what, "planned_bytes": planned, "measured_bytes": taken, "holds": holds})
    return found


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB"


def text_of(found: t.Mapping[str, t.Any]) -> list[str]:
    """The plan as lines for people."""
    text = [
        f"{found['fitting']} of {found['declared']} declared microVMs fit"
        + (f", and {found['more']} more of the last kind" if found["fits"] else "")
        + f". Then: {found['limit']}"
    ]
    text += [f"host      {_mib(one['bytes']):>14}  {one['what']}: {one['why']}" for one in found["host"]]
    for kind in found["instances"]:
        text.append(f"{kind['count']} x {kind['name']}: {_mib(kind['bytes'])} each")
        for one in kind["lines"]:
            text.append(f"{one['scope']:<10}{_mib(one['bytes']):>14}  {one['what']}: {one['why']}")
        text.append(f"{'guest':<10}{_mib(kind['usable_bytes']):>14}  left for its programs")
        if kind["volume_bytes"]:
            text.append(f"{'disk':<10}{_mib(kind['volume_bytes']):>14}  volumes, on disk")
    for node in found["nodes"]:
        kind = "with CPUs" if node["kind"] == "cpu" else "without CPUs (CXL or slow)"
        text.append(f"node {node['id']:<5}{_mib(node['free_bytes']):>14}  left of {_mib(node['size_bytes'])}, {kind}")
    for one in found.get("comparison", []):
        text.append(
            f"measured  {_mib(one['measured_bytes']):>14}  {one['what']}; planned {_mib(one['planned_bytes'])}"
            + ("" if one["holds"] else ": MORE THAN PLANNED")
        )
    return text
