# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report as one page that needs nothing else: no network, no font, no script."""

from __future__ import annotations

import typing as t
from html import escape

from ansible_collections.agentfleet.metal.plugins.module_utils._report import plural, rate, sharing, size, tier_rank

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --card: #fff; --ink: #1c1d20; --soft: #6a6d75; --line: #e4e1db;
  --accent: #0b6e74; --tint: #d5e8e8; --alarm: #b3261e }
@media (prefers-color-scheme: dark) { :root { --paper: #131416; --card: #1b1d20; --ink: #ececea; --soft: #9a9da5;
  --line: #2d3035; --accent: #58c2c4; --tint: #1d4345; --alarm: #ff8a80 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums }
main { max-width: 1120px; margin: 0 auto; padding: 56px 24px 72px }
h1 { font-size: clamp(26px, 4.4vw, 40px); line-height: 1.2; letter-spacing: -.02em; font-weight: 600;
  margin: 8px 0 32px; max-width: 24em; text-wrap: balance }
h1 em { font-style: normal; color: var(--accent) }
h2 { font-size: 21px; letter-spacing: -.01em; font-weight: 600; margin: 64px 0 4px }
h3 { font-size: 13px; font-weight: 600; margin: 36px 0 10px }
p, .soft { color: var(--soft); margin: 0 }
.strip { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 24px; padding: 22px 0;
  border-block: 1px solid var(--line) }
.strip b { display: block; font-size: 25px; font-weight: 600; letter-spacing: -.01em; line-height: 1.3 }
.strip span { color: var(--soft); font-size: 13px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px }
.scroll { overflow-x: auto }
svg { display: block; width: 100%; min-width: 780px; height: auto }
svg text { fill: var(--ink); font-size: 13px } svg .s { fill: var(--soft); font-size: 11.5px }
svg .b { font-weight: 600 } svg .box { fill: var(--paper); stroke: var(--line) } svg .cxl { stroke: var(--accent) }
svg .wire { fill: none; stroke: var(--accent); stroke-width: 1.5 } svg .cpu { fill: var(--ink); opacity: .72 }
svg .rail { fill: var(--tint) } svg .fill { fill: var(--accent) } svg .axis { stroke: var(--line) }
.groups { display: flex; flex-wrap: wrap; gap: 6px; align-items: flex-start }
.group { border: 1px solid var(--line); border-radius: 7px; padding: 5px 9px; font-size: 12px; line-height: 1.45;
  background: var(--card) }
.group i { font-style: normal; color: var(--soft); font-size: 11px; display: block }
.group.vfio { border-color: var(--accent); background: var(--tint) }
code { font: 12.5px ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace }
table { border-collapse: collapse; width: 100%; font-size: 14px }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 12px; padding: 0 16px 7px 0; white-space: nowrap }
td { padding: 9px 16px 9px 0; border-top: 1px solid var(--line); vertical-align: top }
td:last-child, th:last-child { padding-right: 0 }
.n { text-align: right; white-space: nowrap } .ok { color: var(--accent); font-weight: 600 }
.bad { color: var(--alarm); font-weight: 600 } .nowrap { white-space: nowrap }
.vm { display: grid; grid-template-columns: minmax(7.5em, 11em) 1fr; gap: 4px 18px; align-items: center; padding: 7px 0 }
.vm small { display: block; color: var(--soft); font-size: 12px }
.bar { display: flex; height: 20px; border-radius: 4px; overflow: hidden; background: transparent }
.bar .own { background: var(--accent) } .bar .shared { background: var(--tint) }
.sizes { font-size: 12px; color: var(--soft); margin-top: 2px }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 6px 0 14px; background: var(--tint) }
.key.own { background: var(--accent); margin-left: 0 }
.speed { display: inline-block; height: 4px; border-radius: 2px; background: var(--accent); vertical-align: middle;
  margin-left: 10px }
details summary { cursor: pointer; color: var(--soft); font-size: 13px; padding: 8px 0 } td ul { margin: 0; padding: 0;
  list-style: none }
td li { overflow-wrap: anywhere } td li b { font-weight: 600 }
footer { margin-top: 72px; padding-top: 16px; border-top: 1px solid var(--line); color: var(--soft); font-size: 12.5px }
@media (max-width: 560px) { main { padding: 28px 16px 48px } .card { padding: 14px } .vm { grid-template-columns: 1fr }
  h2 { margin-top: 44px } }
@media print { main { padding: 0 } .card { break-inside: avoid } }
"""


def page(document: t.Mapping[str, t.Any]) -> str:
    """The whole page."""
    hosts, pools = document["hosts"], document["pools"]
    run = document["run"]
    body = [
        f"<p>agentfleet.metal · {escape(run['time'].replace('T', ' ').replace('Z', ' UTC'))}</p>",
        f"<h1>{_headline(hosts, pools)}</h1>",
        _strip(hosts, pools),
        *(_host(name, host) for name, host in hosts.items()),
        _pools(pools) if pools else "",
        _changes(hosts),
        f"<footer>agentfleet.metal {escape(run['collection_version'])} · ansible-core {escape(run['ansible_version'])}"
        " · the same in <code>report.json</code>. Bandwidths are one small object each: they prove the path, and on"
        " emulated hardware say nothing about real hardware.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>agentfleet.metal report</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _headline(hosts: t.Mapping[str, t.Any], pools: t.Mapping[str, t.Any]) -> str:
    running = [vm for host in hosts.values() for vm in host["microvms"] if vm["state"] == "running"]
    parts = [plural(len(hosts), "host")]
    if running:
        images = len({vm.get("image_digest") for vm in running})
        parts.append(f"<em>{plural(len(running), 'microVM')}</em> on {plural(images, 'shared image')}")
    if pools:
        tiers = [tier for pool in pools.values() for tier in pool["tiers"]]
        proven = sum(tier["verified"] for tier in tiers)
        state = "proven" if proven == len(tiers) else f'<span class="bad">{proven} of {len(tiers)} proven</span>'
        parts.append(f"<em>{plural(len(tiers), 'cache tier')}</em> {state}")
    return ", ".join(parts) + "."


def _strip(hosts: t.Mapping[str, t.Any], pools: t.Mapping[str, t.Any]) -> str:
    regions = [region for host in hosts.values() for region in host["cxl"]["regions"] if region["state"] == "committed"]
    running = [vm for host in hosts.values() for vm in host["microvms"] if vm["state"] == "running"]
    used, alone = sharing(running)
    capacity = sum(tier["size_bytes"] for pool in pools.values() for tier in pool["tiers"])
    cells = [
        (size(sum(node["size_bytes"] for host in hosts.values() for node in host["numa"]["nodes"])), "memory online"),
        (size(sum(region["size_bytes"] for region in regions)), f"of it CXL, in {plural(len(regions), 'region')}"),
        (str(sum(len(host["vfio"]["functions"]) for host in hosts.values())), "functions given to vfio"),
        (str(sum(pf["vfs"] for host in hosts.values() for pf in host["sriov"])), "SR-IOV virtual functions"),
        (size(alone - used), f"saved by sharing among {plural(len(running), 'microVM')}") if running else None,
        (size(capacity), "of KV-cache tiers") if pools else None,
    ]
    return (
        '<div class="strip">'
        + "".join(f"<div><b>{cell[0]}</b><span>{cell[1]}</span></div>" for cell in cells if cell)
        + "</div>"
    )


def _host(name: str, host: t.Mapping[str, t.Any]) -> str:
    iommu, kernel = host["iommu"], host["kernel"]
    system = " ".join(str(host["os"].get(key, "")) for key in ("id", "version_id", "architecture"))
    traits = [
        system,
        f"kernel {kernel['release']}",
        f"IOMMU {iommu.get('kind', '')}" if iommu.get("enabled") else "IOMMU off",
        "KVM" if host["kvm"].get("present") else "no KVM",
    ]
    parts = [
        f"<h2>{escape(name)}</h2><p>{escape(' · '.join(traits))}</p>",
        f'<h3>Processors and memory, fastest first</h3><div class="card scroll">{topology(host)}</div>',
        _iommu(host),
        _microvms(host["microvms"]),
    ]
    return f"<section>{''.join(parts)}</section>"


# -- the picture ----------------------------------------------------------------


def topology(host: t.Mapping[str, t.Any]) -> str:
    """Nodes in the order of their tiers; below those that are CXL memory their region and its devices."""
    ranks = tier_rank(host)
    nodes = sorted(host["numa"]["nodes"], key=lambda node: (ranks.get(node["id"], 99), node["id"]))
    regions = {region["numa_node"]: region for region in host["cxl"]["regions"] if region["numa_node"] is not None}
    loose = [region for region in host["cxl"]["regions"] if region["numa_node"] is None]
    columns: list[tuple[t.Any, t.Any]] = [(node, regions.get(node["id"])) for node in nodes]
    columns += [(None, region) for region in loose]
    memdevs = {memdev["serial"]: memdev for memdev in host["cxl"]["memdevs"]}
    taken = {serial for region in host["cxl"]["regions"] for serial in region["memdevs"]}
    spare = [memdev for serial, memdev in memdevs.items() if serial not in taken]
    across = min(4, max(1, len(columns)))
    gap, full = 40, 1072

    def rank_of(column: tuple[t.Any, t.Any]) -> int:
        return ranks.get(column[0]["id"], 99) if column[0] else 99

    width = (full - gap * (across - 1)) / across
    shapes: list[str] = []
    top = 0.0
    for start in range(0, len(columns), across):
        row = columns[start : start + across]
        # Each step of the drawing is as high as the tallest node of its row needs.
        inner = max((_node_height(node, width) for node, _region in row if node), default=0)
        for place, (node, region) in enumerate(row):
            x = place * (width + gap)
            if node:
                shapes.append(_node(node, ranks.get(node["id"]), len(set(ranks.values())), x, top, width, inner))
            if place and node and host["numa"].get("demotion") and rank_of(row[place - 1]) < rank_of((node, None)):
                shapes.append(_arrow(x - gap, top + 27))
            if region:
                shapes.append(_region(region, memdevs, x, top + inner, width, bool(node)))
        top += inner + (196 if any(region for _node_, region in row) else 0) + gap
    if spare:
        names = ", ".join(f"{memdev['serial']} ({size(_memdev_bytes(memdev))})" for memdev in spare)
        shapes.append(_text(0, top, f"CXL devices in no region: {names}", "s"))
        top += 20
    title = f"{plural(len(nodes), 'NUMA node')}, {plural(len(host['cxl']['regions']), 'CXL region')}"
    return (
        f'<svg viewBox="-1 -1 {full + 2} {top - gap + 4:.0f}" role="img" aria-label="{title}">'
        + "".join(shapes)
        + "</svg>"
    )


def _arrow(x: float, y: float) -> str:
    """Where the kernel moves cold pages: from a tier to the next slower one."""
    return (
        f'<path class="wire" d="M{x + 6:.0f} {y:.0f}h28m-5 -4l5 4l-5 4"><title>cold pages are demoted</title></path>'
        + _text(x + 20, y + 16, "cold", "s", "middle")
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, kind: str, radius: int = 8) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" rx="{radius}" class="{kind}"/>'


def _cpu_rows(node: t.Mapping[str, t.Any], width: float) -> tuple[int, int]:
    """(squares in a row, rows) of a node's CPUs; at most 128 are drawn."""
    across = int((width - 32 + 4) // 16)
    return across, -(-min(len(node["cpus"]), 128) // across)


def _node_height(node: t.Mapping[str, t.Any], width: float) -> float:
    return 118 + 16 * max(_cpu_rows(node, width)[1], 1)


def _node(
    node: t.Mapping[str, t.Any], rank: int | None, tiers: int, x: float, y: float, width: float, height: float
) -> str:
    across, _rows = _cpu_rows(node, width)
    free = node.get("free_bytes", 0)
    used = node["size_bytes"] - free
    share = used / node["size_bytes"] if node["size_bytes"] else 0
    cpus = "".join(
        _rect(x + 16 + 16 * (index % across), y + 58 + 16 * (index // across), 12, 12, "cpu", 2)
        for index in range(min(len(node["cpus"]), 128))
    )
    label = f"tier {rank} of {tiers}" if rank else "no memory" if not node["size_bytes"] else "tier unknown"
    low = y + height
    return "".join(
        [
            _rect(x, y, width, height, "box"),
            _text(x + 16, y + 27, f"Node {node['id']}", "b"),
            _text(x + width - 16, y + 27, label, "s", "end"),
            _text(x + 16, y + 46, plural(len(node["cpus"]), "CPU") if node["cpus"] else "memory only", "s"),
            cpus,
            _text(x + 16, low - 37, size(node["size_bytes"]), "b"),
            _text(x + width - 16, low - 37, f"{size(free)} free", "s", "end"),
            _rect(x + 16, low - 24, width - 32, 8, "rail", 4),
            _rect(x + 16, low - 24, max((width - 32) * share, 3 if used else 0), 8, "fill", 4),
        ]
    )


def _memdev_bytes(memdev: t.Mapping[str, t.Any]) -> int:
    return int((memdev.get("ram_bytes") or 0) + (memdev.get("pmem_bytes") or 0))


def _region(
    region: t.Mapping[str, t.Any], memdevs: t.Mapping[str, t.Any], x: float, y: float, width: float, wired: bool
) -> str:
    center = x + width / 2
    shapes = [f'<path class="wire" d="M{center:.0f} {y:.0f}v28"/>'] if wired else []
    granularity = f" every {size(region['interleave_granularity'])}" if region.get("interleave_granularity") else ""
    shapes += [
        _rect(x, y + 28, width, 62, "box cxl"),
        _text(x + 16, y + 54, f"CXL region, {region['type']}", "b"),
        _text(x + width - 16, y + 54, region["state"], "s", "end"),
        _text(x + 16, y + 74, f"{size(region['size_bytes'])}, {region['interleave_ways']}-way{granularity}", "s"),
    ]
    serials = region["memdevs"]
    each = (width - 10 * (len(serials) - 1)) / max(len(serials), 1)
    for place, serial in enumerate(serials):
        memdev = memdevs.get(serial, {"serial": serial})
        left = x + place * (each + 10)
        middle = left + each / 2
        shapes += [
            f'<path class="wire" d="M{middle:.0f} {y + 90:.0f}v28"/>',
            _rect(left, y + 118, each, 78, "box"),
            _text(middle, y + 143, serial if len(serial) < 12 else serial[-10:], "b", "middle"),
            _text(middle, y + 162, size(_memdev_bytes(memdev)), "s", "middle"),
            _text(middle, y + 181, memdev.get("host_bridge", ""), "s", "middle"),
        ]
    return "".join(shapes)


# -- lists ----------------------------------------------------------------------

_CLASSES = {
    "0x01": "storage", "0x02": "network", "0x03": "display", "0x04": "media", "0x05": "memory", "0x06": "bridge",
    "0x07": "serial", "0x08": "system", "0x0c": "bus", "0x0b": "processor", "0x12": "accelerator",
}  # fmt: skip


def _iommu(host: t.Mapping[str, t.Any]) -> str:
    groups = host["iommu"]["groups"]
    if not groups:
        return ""
    tiles = []
    for group in groups:
        functions = group["functions"]
        vfio = any("vfio" in (function.get("driver") or "") for function in functions)
        inside = "".join(
            f"<div><code>{escape(function['address'].removeprefix('0000:'))}</code>"
            f"<i>{escape(function.get('driver') or _CLASSES.get(str(function.get('class'))[:4], 'no driver'))}</i></div>"
            for function in functions
        )
        tiles.append(f'<div class="group{" vfio" if vfio else ""}" title="IOMMU group {group["id"]}">{inside}</div>')
    pfs = [
        f"{escape(pf['pf'])} has {plural(pf['vfs'], 'virtual function')} of {pf.get('total_vfs', '?')}"
        for pf in host["sriov"]
        if pf["vfs"]
    ]
    note = f'<p style="margin-top:10px;font-size:13px">{"; ".join(pfs)}</p>' if pfs else ""
    return (
        f'<h3>{plural(len(groups), "IOMMU group")} <span class="soft" style="font-weight:400">'
        f'· <span class="key" style="margin-left:0;outline:1px solid var(--accent)"></span>given to vfio</span></h3>'
        f'<div class="groups">{"".join(tiles)}</div>{note}'
    )


def _microvms(microvms: t.Sequence[t.Mapping[str, t.Any]]) -> str:
    if not microvms:
        return ""
    widest = max([(vm.get("private_bytes") or 0) + (vm.get("shared_bytes") or 0) for vm in microvms] + [1])
    rows = []
    for vm in microvms:
        own, shared = vm.get("private_bytes") or 0, vm.get("shared_bytes") or 0
        state = "" if vm["state"] == "running" else f' <span class="bad">{escape(vm["state"])}</span>'
        digest = escape((vm.get("image_digest") or "").removeprefix("sha256:")[:12])
        rows.append(
            f'<div class="vm"><div><b>{escape(vm["name"])}</b>{state}<small><code>{digest}</code></small></div><div>'
            f'<div class="bar"><div class="own" style="width:{100 * own / widest:.1f}%"></div>'
            f'<div class="shared" style="width:{100 * shared / widest:.1f}%"></div></div>'
            f'<div class="sizes">{size(own)} of its own, {size(shared)} shared</div></div></div>'
        )
    used, alone = sharing(microvms)
    return (
        f"<h3>{plural(len(microvms), 'microVM')}</h3><div class='card'>"
        f'<p style="font-size:13px;margin-bottom:8px"><span class="key own"></span>its own'
        f'<span class="key"></span>shared with the others. Together they take {size(used)}; '
        f"without sharing it would be {size(alone)}.</p>{''.join(rows)}</div>"
    )


def _changes(hosts: t.Mapping[str, t.Any]) -> str:
    parts = []
    for name, host in hosts.items():
        rows = [_change(change) for change in reversed(host["changes"])]
        if not rows:
            continue
        recent, older = _table(rows[:8]), rows[8:]
        more = f"<details><summary>{plural(len(older), 'earlier run')}</summary>{_table(older)}</details>"
        parts.append(f'<h3>{escape(name)}</h3><div class="card scroll">{recent}{more if older else ""}</div>')
    lead = "<h2>What was changed</h2><p>From each host's own audit log, newest first.</p>"
    return f"<section>{lead}{''.join(parts)}</section>" if parts else ""


def _table(rows: t.Iterable[str]) -> str:
    head = "<thead><tr><th>Time (UTC)</th><th>Module</th><th>What it did</th></tr></thead>"
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def _change(change: t.Mapping[str, t.Any]) -> str:
    steps = "".join(f"<li><b>{escape(s['verb'])}</b> {escape(str(s['object']))}</li>" for s in change["steps"])
    why = change.get("failed", "")
    failed = f'<li class="bad">failed: {escape(why if len(why) < 320 else why[:300] + " …")}</li>' if why else ""
    date, _t, clock = change["time"].removesuffix("Z").partition("T")
    return (
        f'<tr><td class="soft">{escape(date)} <span class="nowrap">{escape(clock)}</span></td>'
        f"<td>{escape(change['module'].rpartition('.')[2])}</td><td><ul>{steps}{failed}</ul></td></tr>"
    )


def _pools(pools: t.Mapping[str, t.Any]) -> str:
    parts = [
        "<h2>KV-cache pools</h2>",
        "<p>Each tier was asked to take one object, give it back, and say where its bytes lay.</p>",
    ]
    for name, pool in pools.items():
        fastest = max([max(x["put_bytes_per_second"], x["get_bytes_per_second"]) for x in pool["tiers"]] + [1])
        hosts = {tier["host"] for tier in pool["tiers"]}
        rows = "".join(_tier(tier, fastest, len(hosts) > 1) for tier in pool["tiers"])
        engine = " ".join([pool["engine"], pool.get("engine_version", "")]).strip()
        parts.append(
            f'<h3>{escape(name)} <span class="soft" style="font-weight:400">· {escape(engine)}</span></h3>'
            '<div class="card scroll"><table><thead><tr><th>Tier</th><th class="n">Size</th><th>Where the bytes lie</th>'
            f"<th>Put</th><th>Get</th><th>Proof</th></tr></thead><tbody>{rows}</tbody></table></div>"
        )
    return f"<section>{''.join(parts)}</section>"


def _tier(tier: t.Mapping[str, t.Any], fastest: float, with_host: bool) -> str:
    there, elsewhere = tier.get("pages_on_node", 0), tier.get("pages_elsewhere", 0)
    where = (
        f"{there:,} of {there + elsewhere:,} pages on node {tier['numa_node']}" if there + elsewhere else "a directory"
    )
    if tier["numa_node"] is None and there + elsewhere:
        where = f"{there:,} pages, any node"
    label = escape(tier["medium"].upper()) + (f" on {escape(tier['host'])}" if with_host else "")
    if tier["name"] != tier["medium"]:
        label += f' <span class="soft">{escape(tier["name"])}</span>'
    proof = (
        '<span class="ok">✓ verified</span>'
        if tier["verified"]
        else (f'<span class="bad">✗ {escape(tier.get("problem", "not verified"))}</span>')
    )
    speeds = "".join(
        f'<td class="nowrap">{rate(tier[key])}<span class="speed" style="width:{60 * tier[key] / fastest:.0f}px"></span></td>'
        for key in ("put_bytes_per_second", "get_bytes_per_second")
    )
    return (
        f"<tr><td class='nowrap'>{label}</td><td class='n'>{size(tier['size_bytes'])}</td><td>{where}</td>{speeds}"
        f"<td class='nowrap'>{proof}</td></tr>"
    )
