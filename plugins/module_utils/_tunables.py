# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Kernel modules, their options, sysctls, sysfs attributes and huge pages: now and after a reboot.

What must survive is kept in the system's own drop-in directories, one file of
ours in each. The files are the whole wish: an entry that is no longer wished for
leaves them.
"""

from __future__ import annotations

import os
import posixpath
import re
import typing as t
from dataclasses import dataclass, field

from ansible_collections.agentfleet.metal.plugins.module_utils._boot import SYSFS_FILE
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size, parse_list, parse_size

NAME = "60-agentfleet.conf"
MODULES_FILE = f"/etc/modules-load.d/{NAME}"
OPTIONS_FILE = f"/etc/modprobe.d/{NAME}"
SYSCTL_FILE = f"/etc/sysctl.d/{NAME}"
ORDER_FILE = f"/etc/systemd/system/systemd-tmpfiles-setup.service.d/{NAME}"
HEADER = "# Written by agentfleet.metal (kernel_tunables). Changes are overwritten.\n"
SYSCTL_DIRECTORIES = ("/etc/sysctl.d", "/run/sysctl.d", "/usr/local/lib/sysctl.d", "/usr/lib/sysctl.d")
_MODULE = re.compile(r"^[A-Za-z0-9_-]+$")


@dataclass
class Hugepages:
    """One entry of ``hugepages``, with the file that holds its count."""

    option: str
    node: int
    size: int
    count: int

    @property
    def path(self) -> str:
        """The kernel's counter for this node and size."""
        return f"/sys/devices/system/node/node{self.node}/hugepages/hugepages-{self.size >> 10}kB/nr_hugepages"


@dataclass
class Observed:
    """What the host shows of everything that is wished for."""

    files: dict[str, str]
    loaded: set[str]
    builtin: set[str]
    missing: set[str]
    values: dict[str, str | None] = field(default_factory=dict)  # path -> text, None when it cannot be read
    known_parameters: dict[str, set[str]] = field(default_factory=dict)  # module -> names, when modinfo tells


# The options as Ansible checks them; what they mean is in the documentation of the module kernel_tunables.
OPTIONS: dict[str, t.Any] = {
    "modules": {"type": "list", "elements": "str", "default": []},
    "module_options": {"type": "dict", "default": {}},
    "sysctl": {"type": "dict", "default": {}},
    "sysfs": {"type": "dict", "default": {}},
    "hugepages": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "node": {"type": "int", "required": True},
            "size": {"type": "str", "required": True},
            "count": {"type": "int", "required": True},
        },
    },
}


class Tunables:
    """The wish of the module ``kernel_tunables``."""

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.modules = [self._module(f"modules[{i}]", name) for i, name in enumerate(params.get("modules") or [])]
        self.options: dict[str, dict[str, str]] = {}
        for name, values in (params.get("module_options") or {}).items():
            option = f"module_options.{name}"
            if not isinstance(values, dict) or not values:
                raise Refused(option, values, "not a dictionary of parameters", "Write {parameter: value}")
            self.options[self._module(option, name)] = {
                str(key): _scalar(f"{option}.{key}", value) for key, value in values.items()
            }
        self.sysctl = {
            str(key): _scalar(f"sysctl.{key}", value, numeric=True)
            for key, value in (params.get("sysctl") or {}).items()
        }
        self.sysfs: dict[str, str] = {}
        for path, value in (params.get("sysfs") or {}).items():
            if not str(path).startswith("/sys/") or posixpath.normpath(path) != path or re.search(r"[\s*?\[\]]", path):
                raise Refused(
                    f"sysfs.{path}",
                    value,
                    "not the full path of one attribute below /sys",
                    "Write it without '..', a final slash, blanks or wildcards; for /proc/sys use sysctl",
                )
            self.sysfs[path] = _scalar(f"sysfs.{path}", value)
        self.hugepages: list[Hugepages] = []
        for index, item in enumerate(params.get("hugepages") or []):
            self._add_hugepages(f"hugepages[{index}]", item)

    @staticmethod
    def _module(option: str, name: t.Any) -> str:
        if not isinstance(name, str) or not _MODULE.match(name):
            raise Refused(option, name, "not a module's name", "Write the name that lsmod shows, such as vfio_pci")
        return name.replace("-", "_")

    def _add_hugepages(self, option: str, item: t.Mapping[str, t.Any]) -> None:
        for key, least in (("node", 0), ("count", 0)):
            value = item.get(key)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise Refused(f"{option}.{key}", value, "not a whole number of 0 or more", f"Give {key} as a number")
        entry = Hugepages(option, item["node"], parse_size(f"{option}.size", item.get("size"), 4096), item["count"])
        for other in self.hugepages:
            if other.path == entry.path:
                raise Refused(
                    option,
                    dict(item),
                    f"{other.option} already declares {format_size(entry.size)} pages on node {entry.node}",
                    "Keep one of the two",
                )
        self.hugepages.append(entry)

    # -- observing -----------------------------------------------------------

    def observe(self) -> Observed:
        """Read files, modules and the present values."""
        release = self.host.read("/proc/sys/kernel/osrelease")
        builtin = {
            posixpath.basename(line)[: -len(".ko")].replace("-", "_")
            for line in self.host.read(f"/lib/modules/{release}/modules.builtin").splitlines()
        }
        loaded = {line.split()[0] for line in self.host.read("/proc/modules").splitlines() if line.split()}
        named = {*self.modules, *self.options}
        # Not every built-in driver is listed there; a loadable one has an initstate.
        builtin |= {
            name
            for name in named - loaded
            if self.host.exists(f"/sys/module/{name}") and not self.host.exists(f"/sys/module/{name}/initstate")
        }
        observed = Observed(
            files={
                path: self.host.read(path) for path in (MODULES_FILE, OPTIONS_FILE, SYSCTL_FILE, ORDER_FILE, SYSFS_FILE)
            },
            loaded=loaded,
            builtin=builtin & named,
            missing={name for name in named - loaded - builtin if not self._can_load(name)},
        )
        for name, values in self.options.items():
            paths = {key: f"/sys/module/{name}/parameters/{key}" for key in values}
            observed.values.update({path: self._value(path) for path in paths.values()})
            if name not in observed.missing and any(not self.host.exists(path) for path in paths.values()):
                told = self.host.run(["modinfo", "-F", "parm", name], check=False)
                if told.rc == 0:
                    observed.known_parameters[name] = {line.partition(":")[0] for line in told.stdout.splitlines()}
        for path in [*(sysctl_path(key) for key in self.sysctl), *self.sysfs, *(page.path for page in self.hugepages)]:
            observed.values[path] = self._value(path)
        return observed

    def _can_load(self, name: str) -> bool:
        return self.host.run(["modprobe", "--dry-run", "--quiet", name], check=False).rc == 0

    def _value(self, path: str) -> str | None:
        """Text of an attribute; None when it is missing or cannot be read (a trigger)."""
        found = self.host.text(path)
        return None if found is None else found.strip()

    # -- planning ------------------------------------------------------------

    def plan(self, observed: Observed) -> list[Step]:
        """Options, modules and running values first; then the files that keep them."""
        self._refuse(observed)
        steps = [*self._file(observed, OPTIONS_FILE, self.options_text(observed))]
        steps += [
            Step("load", f"module {name}", "absent", "loaded", data=("load", name))
            for name in self.modules
            if name not in observed.loaded | observed.builtin
        ]
        for name, values in self.options.items():
            for key, value in values.items():
                path = f"/sys/module/{name}/parameters/{key}"
                now = observed.values.get(path)
                if now is not None and not same(now, value) and self._writable(path):
                    steps.append(self._poke(path, now, value))
        for key, value in self.sysctl.items():
            now = observed.values.get(sysctl_path(key))
            if now is None or now.split() != value.split():
                steps.append(Step("set", key, now, value, data=("poke", sysctl_path(key), value)))
        for path, value in self.sysfs.items():
            now = observed.values.get(path)
            if now is None or not same(now, value):
                steps.append(self._poke(path, now, value))
        for page in sorted(self.hugepages, key=lambda page: page.count > int(observed.values.get(page.path) or 0)):
            now = observed.values[page.path]
            if now != str(page.count):
                what = f"{format_size(page.size)} pages on node {page.node}"
                steps.append(Step("set", what, int(now or 0), page.count, data=("hugepages", page)))
        steps += self._file(observed, MODULES_FILE, self.modules_text())
        steps += self._file(observed, SYSCTL_FILE, self.sysctl_text())
        sysfs = self.sysfs_text(observed)
        # Nothing else orders the two, and an attribute that is not there yet is passed over.
        order = _text(["[Unit]", "After=systemd-modules-load.service"] if sysfs else [])
        return [*steps, *self._file(observed, ORDER_FILE, order), *self._file(observed, SYSFS_FILE, sysfs)]

    def _refuse(self, observed: Observed) -> None:
        for index, name in enumerate(self.modules):
            if name in observed.missing:
                raise Refused(
                    f"modules[{index}]",
                    name,
                    "the running kernel has no such module",
                    "Correct the name, or install the kernel's package of extra modules",
                )
        pending = [name for name in self.modules if name not in observed.loaded | observed.builtin]
        for name, values in self.options.items():
            for key, value in values.items():
                self._refuse_parameter(observed, name, key, value)
        for key, value in self.sysctl.items():
            path = sysctl_path(key)
            if not self.host.exists(path) and not pending:
                raise Refused(
                    f"sysctl.{key}",
                    value,
                    f"the kernel has no {path}",
                    "Correct the name, or add the module that brings it to modules",
                )
            self._refuse_override(key, value)
        for path, value in self.sysfs.items():
            if not self.host.exists(path):
                if pending:
                    continue
                raise Refused(
                    f"sysfs.{path}",
                    value,
                    "there is no such attribute",
                    "Correct the path, or add the module that brings it to modules",
                )
            if observed.values[path] is None or not self._writable(path):
                raise Refused(
                    f"sysfs.{path}",
                    value,
                    "not an attribute that can be both read and written, so it holds no state",
                    "Use attributes that hold a value; a trigger belongs into a task of yours",
                )
        for page in self.hugepages:
            self._refuse_hugepages(observed, page)

    def _refuse_parameter(self, observed: Observed, name: str, key: str, value: str) -> None:
        option = f"module_options.{name}.{key}"
        if name in observed.missing:
            raise Refused(option, value, f"the running kernel has no module {name}", "Correct the module's name")
        known = observed.known_parameters.get(name)
        path = f"/sys/module/{name}/parameters/{key}"
        if known is not None and key not in known and not self.host.exists(path):
            raise Refused(
                option,
                value,
                f"module {name} has no parameter {key}",
                f"It has {', '.join(sorted(known)) or 'none'}",
            )
        now = observed.values.get(path)
        if name in observed.builtin and not (now is not None and self._writable(path)):
            raise Refused(
                option,
                value,
                f"{name} is built into the kernel, and this parameter cannot be changed while it runs",
                f"Put it on the command line: kernel_cmdline: {{{name}.{key}: '{value}'}}",
            )

    def _refuse_override(self, key: str, value: str) -> None:
        """A later file that says otherwise would win at the next boot."""
        seen: set[str] = set()
        for directory in SYSCTL_DIRECTORIES:
            for name in self.host.names(directory):
                if name <= NAME or not name.endswith(".conf") or name in seen:
                    continue
                seen.add(name)
                for line in self.host.read(f"{directory}/{name}").splitlines():
                    other, equals, text = line.strip().lstrip("-").partition("=")
                    if not equals or line.lstrip().startswith(("#", ";")):
                        continue
                    if sysctl_path(other.strip()) == sysctl_path(key) and text.split() != value.split():
                        raise Refused(
                            f"sysctl.{key}",
                            value,
                            f"{directory}/{name} sets it to {text.strip()!r} and is read after our file",
                            "Remove the line there, or wish for the same value",
                        )

    def _refuse_hugepages(self, observed: Observed, page: Hugepages) -> None:
        base = f"/sys/devices/system/node/node{page.node}"
        nodes = parse_list(self.host.read("/sys/devices/system/node/online"))
        if page.node not in nodes:
            raise Refused(f"{page.option}.node", page.node, "there is no such NUMA node", f"Use one of {_join(nodes)}")
        if observed.values.get(page.path) is None:
            sizes = [int(name.split("-")[1][:-2]) << 10 for name in self.host.names(f"{base}/hugepages")]
            raise Refused(
                f"{page.option}.size",
                format_size(page.size),
                "the kernel has no pages of this size",
                f"Use one of {', '.join(format_size(size) for size in sizes) or 'none: the kernel has no hugetlbfs'}",
            )
        match = re.search(r"MemTotal:\s+(\d+) kB", self.host.read(f"{base}/meminfo"))
        total = int(match.group(1)) << 10 if match else 0
        if total and page.count * page.size > total:
            raise Refused(
                f"{page.option}.count",
                page.count,
                f"{format_size(page.count * page.size)} is more than node {page.node} has",
                f"At most {total // page.size} pages of {format_size(page.size)} fit, and the system needs some memory",
            )

    def _writable(self, path: str) -> bool:
        try:
            return bool(os.stat(self.host.path(path)).st_mode & 0o222)
        except OSError:
            return False

    @staticmethod
    def _poke(path: str, now: str | None, value: str) -> Step:
        return Step("set", path, now, value, data=("poke", path, value))

    # -- files ---------------------------------------------------------------

    def options_text(self, observed: Observed) -> str:
        """Content of the file in modprobe.d, which has no effect on built-in drivers."""
        return _text(
            f"options {name} " + " ".join(f"{key}={value}" for key, value in values.items())
            for name, values in self.options.items()
            if name not in observed.builtin
        )

    def modules_text(self) -> str:
        """Content of the file in modules-load.d."""
        return _text(dict.fromkeys(self.modules))

    def sysctl_text(self) -> str:
        """Content of the file in sysctl.d."""
        return _text(f"{key} = {value}" for key, value in self.sysctl.items())

    def sysfs_text(self, observed: Observed) -> str:
        """Content of the file in tmpfiles.d: attributes, parameters of built-in drivers and huge pages."""
        lines = [
            *(
                (f"/sys/module/{name}/parameters/{key}", value)
                for name, values in self.options.items()
                for key, value in values.items()
                if name in observed.builtin
            ),
            *self.sysfs.items(),
            *((page.path, str(page.count)) for page in self.hugepages),
        ]
        return _text(f"w {path.replace('%', '%%')} - - - - {value.replace('%', '%%')}" for path, value in lines)

    @staticmethod
    def _file(observed: Observed, path: str, text: str) -> list[Step]:
        before = observed.files[path]
        if before == text.strip():
            return []
        verb = "write" if text else "remove"
        return [
            Step(verb, path, before or None, text or None, "so that it is so after a reboot", data=("file", path, text))
        ]

    # -- applying ------------------------------------------------------------

    def apply(self, step: Step) -> None:
        """Carry out one step; a value that the kernel does not take is put back."""
        kind, *rest = step.data
        if kind == "file":
            path, text = rest
            if text:
                self.host.write(path, text)
            else:
                self.host.remove(path)
        elif kind == "load":
            self.host.run(["modprobe", rest[0]])
        elif kind == "poke":
            path, value = rest
            self.host.poke(path, value)
            now = self._value(path)
            if now is not None and not same(now, value):
                raise HostError(f"{path} shows {now!r} after {value!r} was written. Wish for a value that it takes")
        else:
            self._set_hugepages(rest[0])

    def _set_hugepages(self, page: Hugepages) -> None:
        before = self.host.read(page.path)
        for attempt in range(2):
            if attempt:  # memory may just be scattered
                self.host.poke("/proc/sys/vm/compact_memory", "1")
            self.host.poke(page.path, str(page.count))
            got = int(self.host.read(page.path) or 0)
            if got == page.count:
                return
        self.host.poke(page.path, before)
        late = (
            f"reserve them at boot with kernel_cmdline: {{hugepagesz: 1G, hugepages: '{page.node}:{page.count}'}}"
            if page.size >= 1 << 30
            else "free memory on that node"
        )
        raise HostError(
            f"the kernel gave {got} of {page.count} pages of {format_size(page.size)} on node {page.node} "
            f"(back to {before} now): {got} are possible at present. Lower the count or {late}"
        )

    # -- reporting -----------------------------------------------------------

    def result(self, observed: Observed) -> dict[str, t.Any]:
        """What runs, and what waits for a module reload or a reboot."""
        reloads = []
        for name, values in self.options.items():
            for key, value in values.items():
                path = f"/sys/module/{name}/parameters/{key}"
                now = observed.values.get(path)
                if now is None or same(now, value) or self._writable(path):
                    continue
                free = self.host.read(f"/sys/module/{name}/refcnt") == "0"
                reloads.append(
                    {
                        "module": name,
                        "parameter": key,
                        "running": now,
                        "wanted": value,
                        "action": "reload" if free else "reboot",
                    }
                )
        return {
            "module_reloads": reloads,
            "reboot_required": bool(reloads),
            "reboot_reasons": [
                f"module {item['module']}: runs with {item['parameter']}={item['running']}, configured {item['wanted']}"
                + (f" (or reload it: modprobe -r {item['module']})" if item["action"] == "reload" else "")
                for item in reloads
            ],
            "sysctl": {key: observed.values.get(sysctl_path(key)) for key in self.sysctl},
            "sysfs": {path: observed.values.get(path) for path in self.sysfs},
            "hugepages": [
                {"node": page.node, "size": format_size(page.size), "count": int(observed.values.get(page.path) or 0)}
                for page in self.hugepages
            ],
        }


def sysctl_path(key: str) -> str:
    """Path of a sysctl; as in sysctl.d, dots and slashes change places unless a slash comes first."""
    first = re.search(r"[./]", key)
    if first and first.group() == ".":
        key = key.translate(str.maketrans("./", "/."))
    return "/proc/sys/" + key


def same(now: str, wanted: str) -> bool:
    """Whether an attribute shows what was wished: Y is 1, and ``a [b] c`` is b."""
    chosen = re.search(r"\[(\S+)\]", now)
    if chosen and wanted == chosen.group(1):
        return True
    alike = {"Y": "1", "N": "0", "y": "1", "n": "0", "true": "1", "false": "0", "on": "1", "off": "0"}
    return [alike.get(word, word) for word in now.split()] == [alike.get(word, word) for word in wanted.split()]


def _scalar(option: str, value: t.Any, numeric: bool = False) -> str:
    """Text of a number or string; what YAML may have misread is refused."""
    if isinstance(value, bool):
        raise Refused(
            option,
            value,
            "a YAML boolean, and the kernel's word for it is not known",
            "Write 1 or 0" if numeric else "Write it in quotes as the kernel spells it ('1', 'Y', 'on', 'true')",
        )
    if not isinstance(value, (str, int)) or not str(value).strip() or "\n" in str(value):
        raise Refused(option, value, "not one line of text and not a number", "Give one value, in quotes if in doubt")
    return str(value).strip()


def _text(lines: t.Iterable[str]) -> str:
    body = "".join(f"{line}\n" for line in lines)
    return HEADER + body if body else ""


def _join(numbers: t.Iterable[int]) -> str:
    return ", ".join(str(number) for number in numbers)
