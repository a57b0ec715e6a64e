# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Definitions of images: what is asked for, checked, and its digest.

This module is private to the collection and imports nothing of Ansible.

A definition is all that decides what an image contains, as JSON; files and directories of the builder are in it with
their SHA-256. The name of an image and the mirror are not part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import typing as t
from dataclasses import dataclass, field

from ansible_collections.agentfleet.metal.plugins.module_utils import _early_init, _guest_kernel, _initramfs, _oci
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host, sha256_of
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused

FORMAT = 2  # part of every definition digest; raise it when the same definition gives another image
NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,62}[a-z0-9])?")
USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
UNIT = re.compile(r"[A-Za-z0-9:_.@-]+\.(service|socket|timer|path|target|mount)")
HASHED = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[A-Za-z0-9,._-]+\])?==[^\s,;]+( *;[^#]+?)?( +--hash=sha256:[0-9a-f]{64})+"
)
DEFAULT_PACKAGES = ("python3", "e2fsprogs")  # for the agent and for modules over vsock; for volumes
# Of an image that is made of another one or of an OCI image, these are the base's.
FROM_BASE = ("family", "suite", "components", "mirror", "kernel_package", "kernel_source", "kernel_modules")
# An image of data has nothing that runs.
NOT_DATA = (*FROM_BASE, "base", "packages", "python_requirements", "users", "services", "units", "verity", "sbom")
LARGE = 1 << 20  # files from here on are not hashed again while they look the same


def canonical(value: t.Any) -> bytes:
    """One spelling for one value, so that equal values have equal digests."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest_of(value: t.Any) -> str:
    """The SHA-256 of a value's one spelling."""
    return hashlib.sha256(canonical(value)).hexdigest()


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Item:
    """One path of an image that comes from its definition.

    :param source: real path of a file on the builder
    """

    kind: str  # file, directory, link
    mode: int = 0
    owner: str = "root"
    group: str = "root"
    data: bytes = b""
    source: str = ""
    sha256: str = ""  # of the content; for a link its target

    def public(self) -> list[t.Any]:
        """What of it decides the image."""
        return [self.kind, self.mode, self.owner, self.group, self.sha256]


@dataclass
class Definition:
    """One image as it is wanted."""

    name: str
    option: str
    content: dict[str, t.Any]  # the definition itself
    base: Definition | None
    oci: _oci.Image | None
    mirror: str | None
    family: str
    packages: list[str]
    items: dict[str, Item]
    sbom: bool
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        self.digest = digest_of(self.content)

    @property
    def kernel(self) -> dict[str, t.Any]:
        """The definition of its kernel; empty for an image of data."""
        return t.cast("dict[str, t.Any]", self.content.get("kernel", {}))

    @property
    def data(self) -> bool:
        """Whether it is data alone, without an operating system."""
        return "data" in self.content

    @property
    def root(self) -> Definition:
        """The lowest image of its bases."""
        return self.base.root if self.base else self


class FileDigests:
    """SHA-256 of the builder's files; large ones are remembered while size, times and inode stay the same.

    :param memory: path -> [what it looks like, digest], as the cache keeps it
    """

    def __init__(self, memory: t.Mapping[str, t.Any]) -> None:
        self._memory = memory
        self.seen: dict[str, t.Any] = {}

    def of(self, path: str) -> str:
        """The digest of a file."""
        status = os.stat(path)
        if status.st_size < LARGE:
            return sha256_of(path)
        looks = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        known = self._memory.get(path)
        self.seen[path] = known if known and known[0] == looks else [looks, sha256_of(path)]
        return str(self.seen[path][1])


def read_all(host: Host, images: t.Sequence[t.Mapping[str, t.Any]], digests: FileDigests) -> list[Definition]:
    """All definitions of a call, bases before what is made of them; raises Refused."""
    by_name: dict[str, tuple[str, t.Mapping[str, t.Any]]] = {}
    for index, image in enumerate(images):
        option, name = f"images[{index}]", image["name"]
        if not NAME.fullmatch(name):
            raise Refused(
                f"{option}.name", name, "not a name of an image",
                "Use 1 to 64 of a-z, 0-9, dot and hyphen, beginning and ending with a letter or digit",
            )  # fmt: skip
        if name in by_name:
            raise Refused(f"{option}.name", name, "named twice", "Give each image its own name")
        by_name[name] = (option, image)
    done: dict[str, Definition] = {}

    def resolve(name: str, chain: tuple[str, ...]) -> Definition:
        if name in done:
            return done[name]
        option, image = by_name[name]
        base = None
        if image["base"] is not None:
            if image["base"] in (*chain, name):
                raise Refused(
                    f"{option}.base", image["base"], f"goes round: {' -> '.join([*chain, name, image['base']])}",
                    "Let one of them be made of packages or an OCI image",
                )  # fmt: skip
            if image["base"] not in by_name:
                raise Refused(
                    f"{option}.base", image["base"], "no image of this call",
                    f"Define it beside this one (defined: {', '.join(by_name)})",
                )  # fmt: skip
            base = resolve(image["base"], (*chain, name))
            if base.data:
                raise Refused(
                    f"{option}.base", image["base"], "is an image of data", "Attach it to microVMs with data_images"
                )
        done[name] = _Reader(host, option, image, base, digests).read()
        return done[name]

    for name in by_name:
        resolve(name, ())
    return list(done.values())


class _Reader:
    """Checks one image's options."""

    def __init__(
        self, host: Host, option: str, image: t.Mapping[str, t.Any], base: Definition | None, digests: FileDigests
    ) -> None:
        self.host, self.option, self.image, self.base, self.digests = host, option, image, base, digests
        self.items: dict[str, Item] = {}

    def _refuse(self, key: str, value: t.Any, problem: str, remedy: str) -> Refused:
        return Refused(f"{self.option}.{key}", value, problem, remedy)

    def read(self) -> Definition:
        """The definition."""
        image = self.image
        if image["base"] is not None and image["oci"] is not None:
            raise self._refuse("oci", image["oci"]["path"], "an image has one base", "Give base or oci")
        for key in FROM_BASE:
            if self.base and image[key] is not None:
                raise self._refuse(
                    key, image[key], f"comes from the base {image['base']}", "Give it there, or leave base out"
                )
        for key in ("packages", "kernel_modules"):
            for number, word in enumerate(image[key] or []):
                if not re.fullmatch(r"[A-Za-z0-9][^\s,]*", word):
                    raise self._refuse(
                        f"{key}[{number}]", word, f"not a {'package' if key == 'packages' else 'module'}",
                        "Write one a list item, with no options",
                    )  # fmt: skip
        oci = self._oci()
        if image["data"]:
            return self._data(oci)
        packages = image["packages"]
        if packages is None:
            packages = [] if self.base or oci else list(DEFAULT_PACKAGES)
        content: dict[str, t.Any] = {
            "format": FORMAT,
            "early_init": _text_digest(_early_init.SCRIPT),
            "packages": sorted(set(packages)),
            "python_requirements": self._requirements(),
            **self._file_system(),
        }
        if self.base:
            content["base"] = self.base.digest
            content["kernel"] = dict(self.base.kernel)
            modules = self.base.content.get("initramfs", {}).get("modules")
        else:
            family, suite = image["family"] or "debian", image["suite"] or "trixie"
            content.update(suite=suite, components=image["components"] or ["main"], family=family)
            content["kernel"] = self._kernel(content)
            modules = None if image["kernel_source"] else image["kernel_modules"] or []
            if oci:
                content["oci"] = oci.digest
        if modules is not None:
            content["kernel"]["verity"] = content["verity"]
            content["initramfs"] = {"modules": modules, "recipe": _text_digest(repr(_initramfs.RECIPE))}
        self._files()
        self._directories()
        content["users"] = self._users()
        self._services()
        content["units"] = self._units()
        content["items"] = self._public_items()
        root = self.base.root if self.base else None
        return Definition(
            image["name"], self.option, content, self.base, oci,
            root.mirror if root else image["mirror"], root.family if root else content["family"],
            packages, self.items, image["sbom"],
        )  # fmt: skip

    def _data(self, oci: _oci.Image | None) -> Definition:
        """Of an image that has directories and files alone."""
        for key in NOT_DATA:
            if self.image[key]:
                raise self._refuse(
                    key, self.image[key], "of no use in an image of data", "Leave it out, or leave data out"
                )
        content: dict[str, t.Any] = {
            "format": FORMAT, "data": True, "packages": [], "python_requirements": [], "users": [], "units": [],
            **self._file_system(),
        }  # fmt: skip
        if oci:
            content["oci"] = oci.digest
        self._files()
        self._directories()
        if not self.items and not oci:
            raise self._refuse("data", True, "an image of nothing", "Give directories, files or oci")
        content["items"] = self._public_items()
        return Definition(self.image["name"], self.option, content, None, oci, None, "", [], self.items, False)

    def _public_items(self) -> dict[str, list[t.Any]]:
        for path in self.items:
            parent = os.path.dirname(path)
            while parent != "/":
                if parent in self.items and self.items[parent].kind != "directory":
                    raise self._refuse("files", path, f"lies below the file {parent}", "Correct one of the paths")
                parent = os.path.dirname(parent)
        return {path: item.public() for path, item in sorted(self.items.items())}

    def _requirements(self) -> list[str]:
        wishes: list[str] = self.image["python_requirements"]
        hashed = any("--hash" in wish for wish in wishes)
        for number, wish in enumerate(wishes):
            if hashed and not HASHED.fullmatch(wish.strip()):
                raise self._refuse(
                    f"python_requirements[{number}]", wish, "not NAME==VERSION --hash=sha256:..., as others of the list are",
                    "With one hash all requirements, also indirect ones, need version and hash (pip-compile --generate-hashes)",
                )  # fmt: skip
            if not hashed and not re.fullmatch(r"[A-Za-z0-9][^\s,]*(,[<>=!~][^\s,]*)*", wish):
                raise self._refuse(
                    f"python_requirements[{number}]", wish, "not a package", "Write one package a list item, no options"
                )
        return [" ".join(wish.split()) for wish in wishes]

    def _file_system(self) -> dict[str, t.Any]:
        image = self.image
        if image["filesystem"] not in ("erofs", "ext4"):
            raise self._refuse("filesystem", image["filesystem"], "not a file system of images", "Use erofs or ext4")
        if image["verity"] and image["dax"]:
            raise self._refuse(
                "verity", True, "dm-verity reads through the guest's page cache and so excludes DAX",
                "Set dax: false (each guest then has a copy of what it reads), or leave verity out: "
                "hosts verify the image when it arrives",
            )  # fmt: skip
        return {key: image[key] for key in ("filesystem", "dax", "verity")}

    def _kernel(self, content: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        image, source = self.image, self.image["kernel_source"]
        kernel = {"recipe": _guest_kernel.RECIPE, "suite": content["suite"], "components": content["components"]}
        if source is None:
            return {**kernel, "package": image["kernel_package"] or "linux-image-cloud-amd64"}
        for key in ("kernel_package", "kernel_modules"):
            if image[key] is not None:
                raise self._refuse(
                    key, image[key], "of no use with kernel_source: that kernel has everything built in",
                    "Give options in kernel_source.fragment instead",
                )  # fmt: skip
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", source["package"]):
            raise self._refuse(
                "kernel_source.package", source["package"], "not a package", "Name one such as linux-source"
            )
        lines = (source["fragment"] or "").splitlines()
        for line in lines:
            if line.strip() and not re.fullmatch(r"CONFIG_\w+=(y|n|-?\d+|0x[0-9a-fA-F]+|\"[^\"]*\")|#.*", line.strip()):
                raise self._refuse(
                    "kernel_source.fragment", line, "not a line of a kernel configuration, or a module",
                    "Write CONFIG_NAME=y, =n, =number or =\"text\": there is no initramfs to load modules from",
                )  # fmt: skip
        fragment = "".join(f"{line.strip()}\n" for line in lines if line.strip())
        return {
            **kernel, "source": source["package"], "fragment": fragment,
            "options": _text_digest(_guest_kernel.FRAGMENT),
        }  # fmt: skip

    def _oci(self) -> _oci.Image | None:
        oci = self.image["oci"]
        if oci is None:
            return None
        try:
            return _oci.read(self.host.path(oci["path"]), oci["tag"])
        except OSError as error:
            raise self._refuse(
                "oci.path", oci["path"], f"cannot be read ({error.strerror})",
                "Give a layout directory or archive on the builder",
            ) from error  # fmt: skip
        except _oci.OciError as error:
            raise self._refuse(
                "oci", oci["path"], str(error),
                "Export the image again as an OCI layout (one image, or name its tag)",
            ) from error  # fmt: skip

    # -- what lies over the packages -------------------------------------------

    def _path(self, where: str, path: str) -> str:
        if not path.startswith("/") or os.path.normpath(path) != path or path == "/":
            raise self._refuse(where, path, "not a clean absolute path", "Write a path such as /opt/agent/run")
        return path

    def _mode(self, where: str, mode: str) -> int:
        if not re.fullmatch(r"0?[0-7]{3,4}", mode):
            raise self._refuse(where, mode, "not an octal mode", "Write a mode such as '0644'")
        return int(mode, 8)

    def _owner(self, where: str, name: str) -> str:
        if not (USER.fullmatch(name) or name.isdigit()):
            raise self._refuse(where, name, "neither a name nor a number", "Give a user of the image, or an id")
        return name

    def _add(self, where: str, path: str, item: Item) -> None:
        if path in self.items and not (item.kind == self.items[path].kind == "directory"):
            raise self._refuse(where, path, "named twice", "Give each file of an image once")
        self.items[path] = item

    def _files(self) -> None:
        for number, file in enumerate(self.image["files"]):
            where = f"files[{number}]"
            path = self._path(f"{where}.path", file["path"])
            if (file["src"] is None) == (file["content"] is None):
                raise self._refuse(where, path, "not exactly one of src and content", "Give src or content")
            item = Item(
                "file", self._mode(f"{where}.mode", file["mode"]), self._owner(f"{where}.owner", file["owner"]),
                self._owner(f"{where}.group", file["group"]),
            )  # fmt: skip
            self._content(f"{where}.src", file, item)
            self._add(f"{where}.path", path, item)

    def _content(self, where: str, given: t.Mapping[str, t.Any], item: Item) -> None:
        if given["src"] is None:
            item.data, item.sha256 = given["content"].encode(), _text_digest(given["content"])
            return
        item.source = self.host.path(given["src"])
        if not os.path.isfile(item.source):
            raise self._refuse(where, given["src"], "no such file on the builder", "Correct the path")
        item.sha256 = self.digests.of(item.source)

    def _directories(self) -> None:
        for number, wish in enumerate(self.image["directories"]):
            where = f"directories[{number}]"
            path = self._path(f"{where}.path", wish["path"])
            owner = self._owner(f"{where}.owner", wish["owner"]), self._owner(f"{where}.group", wish["group"])
            mode = self._mode(f"{where}.mode", wish["mode"])
            self._add(f"{where}.path", path, Item("directory", mode, *owner))
            if wish["src"] is None:
                continue
            source = self.host.path(wish["src"])
            if not os.path.isdir(source):
                raise self._refuse(f"{where}.src", wish["src"], "no such directory on the builder", "Correct the path")
            for directory, directories, files in os.walk(source):
                directories.sort()
                below = path + directory[len(source.rstrip("/")) :]
                for name in [*directories, *sorted(files)]:
                    item = self._found(where, os.path.join(directory, name), owner)
                    self._add(f"{where}.path", f"{below}/{name}", item)

    def _found(self, where: str, real: str, owner: tuple[str, str]) -> Item:
        if os.path.islink(real):
            return Item("link", 0o777, *owner, sha256=os.readlink(real))
        if os.path.isdir(real):
            return Item("directory", 0o755, *owner)
        if not os.path.isfile(real):
            raise self._refuse(f"{where}.src", real, "neither file, directory nor link", "Remove it from the directory")
        # Of the modes only this is the author's, and archives may lose it; the rest is the umask of who unpacked them.
        with open(real, "rb") as file:
            mode = 0o755 if os.stat(real).st_mode & 0o100 or file.read(2) == b"#!" else 0o644
        return Item("file", mode, *owner, source=real, sha256=self.digests.of(real))

    def _users(self) -> list[dict[str, t.Any]]:
        found: list[dict[str, t.Any]] = []
        for number, user in enumerate(self.image["users"]):
            where = f"users[{number}]"
            if not USER.fullmatch(user["name"]):
                raise self._refuse(f"{where}.name", user["name"], "not a name of a user", "Use a-z, 0-9, _ and -")
            if user["name"] in [other["name"] for other in found]:
                raise self._refuse(f"{where}.name", user["name"], "named twice", "Give each user once")
            if not 1 <= user["uid"] <= 60000 or user["uid"] in [other["uid"] for other in found]:
                raise self._refuse(
                    f"{where}.uid", user["uid"], "not from 1 to 60000, or another user's", "Give each user its own id"
                )
            for key in ("home", "shell"):
                if user[key] is not None:
                    self._path(f"{where}.{key}", user[key])
            for index, group in enumerate(user["groups"]):
                if not USER.fullmatch(group):
                    raise self._refuse(
                        f"{where}.groups[{index}]", group, "not a name of a group", "Use a-z, 0-9, _ and -"
                    )
            home = user["home"] or f"/home/{user['name']}"
            found.append({**user, "home": home, "shell": user["shell"] or "/usr/sbin/nologin"})
            if home not in self.items:
                self._add(f"{where}.home", home, Item("directory", 0o700, user["name"], user["name"]))
        return found

    def _services(self) -> None:
        names = set()
        for number, service in enumerate(self.image["services"]):
            where = f"services[{number}]"
            if not NAME.fullmatch(service["name"]):
                raise self._refuse(f"{where}.name", service["name"], "not a name of a service", "Use a-z, 0-9, . and -")
            if service["name"] in names:
                raise self._refuse(f"{where}.name", service["name"], "named twice", "Give each service its own name")
            names.add(service["name"])
            if not service["command"] or not service["command"][0].startswith("/"):
                raise self._refuse(
                    f"{where}.command", service["command"], "does not begin with an absolute path",
                    "Write a list such as [/usr/bin/python3, -m, worker]",
                )  # fmt: skip
            for key in service["environment"]:
                if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
                    raise self._refuse(
                        f"{where}.environment", key, "not a name of a variable", "Use letters, digits and _"
                    )
            text = service_script(
                service["command"], self._owner(f"{where}.user", service["user"]), service["environment"]
            )
            path = f"{_early_init.LIBRARY}/services/{service['name']}"
            item = Item("file", 0o755, data=text.encode(), sha256=_text_digest(text))
            self._add(f"{where}.name", path, item)

    def _units(self) -> list[str]:
        for number, unit in enumerate(self.image["units"]):
            where = f"units[{number}]"
            if not UNIT.fullmatch(unit["name"]):
                raise self._refuse(
                    f"{where}.name", unit["name"], "not a name of a unit", "Write one such as agent.service"
                )
            if (unit["src"] is None) == (unit["content"] is None):
                raise self._refuse(where, unit["name"], "not exactly one of src and content", "Give src or content")
            item = Item("file", 0o644)
            self._content(f"{where}.src", unit, item)
            self._add(f"{where}.name", f"/etc/systemd/system/{unit['name']}", item)
            if not unit["enabled"]:
                continue
            text = item.data.decode() if not item.source else Host("/").read(item.source)
            links = install_links(unit["name"], text)
            if not links:
                raise self._refuse(
                    f"{where}.enabled", unit["name"], "its [Install] section names no WantedBy, RequiredBy or Alias",
                    "Add WantedBy=multi-user.target, or set enabled: false",
                )  # fmt: skip
            for link in links:
                self._add(f"{where}.name", link, Item("link", 0o777, sha256=f"/etc/systemd/system/{unit['name']}"))
        return [unit["name"] for unit in self.image["units"]]


def service_script(command: t.Sequence[str], user: str, environment: t.Mapping[str, str]) -> str:
    """The program under which a service runs; init starts it again when it ends."""
    exports = "".join(f"export {key}={shlex.quote(str(value))}\n" for key, value in sorted(environment.items()))
    words = " ".join(map(shlex.quote, command))
    if user != "root":
        words = f"/usr/bin/setpriv --reuid={user} --regid={user} --init-groups --inh-caps=-all -- {words}"
    return f"#!/bin/sh\n{exports}exec {words}\n"


def install_links(name: str, text: str) -> list[str]:
    """The links that enable a unit, as its [Install] section says."""
    section = ""
    links = []
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            section = line
        key, equal, value = line.partition("=")
        if section != "[Install]" or not equal:
            continue
        for word in value.split():
            if key.strip() in ("WantedBy", "RequiredBy"):
                kind = "wants" if key.strip() == "WantedBy" else "requires"
                links.append(f"/etc/systemd/system/{word}.{kind}/{name}")
            elif key.strip() == "Alias":
                links.append(f"/etc/systemd/system/{word}")
    return [link for link in links if os.path.normpath(link) == link]
