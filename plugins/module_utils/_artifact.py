# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Programs from archives and packages that are pinned by their SHA-256, each release in a directory of its own.

Packages are unpacked, not installed: no maintainer script runs (that of FoundationDB would start a
database of its own), and releases stand side by side, so that an upgrade is a change of a path.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import typing as t
from urllib.parse import unquote

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host, sha256_of
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step

RECORD = ".agentfleet.json"
# Opens a URL, with a bound in seconds: Ansible's own open_url, which this file must not import.
Fetch = t.Callable[[str, int], t.Any]
_URL = re.compile(r"^(https?|file)://")
_LOGIN = re.compile(r"^(\w[\w+.-]*://)([^/?#]*)@")
_KINDS = {
    "archive": (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst"),
    "package": (".deb", ".rpm"),
}
_HIERARCHY = {"bin", "sbin", "usr", "opt", "lib", "lib64", "etc", "configs", "var"}
_BLOCK = 1 << 20


def shown(src: str) -> str:
    """A source as it may be seen: without the user and password that a URL may have."""
    return _LOGIN.sub(r"\1", src)


def secrets(src: str) -> set[str]:
    """What of a source nobody may see, as it is written and as it is sent."""
    login = _LOGIN.match(src)
    words = {login[2], login[2].partition(":")[2]} - {""} if login else set()
    return words | {unquote(word) for word in words}


def release_path(
    directory: str, sources: t.Sequence[t.Mapping[str, t.Any]], subdirectory: str = "", build: t.Sequence[str] = ()
) -> str:
    """The directory of a release: known by the digests that it is made of, and by what is made of them.

    Roles name it in the same way: ``threefs__release`` and ``foundationdb__release``.
    """
    joined = "".join(str(source["sha256"]).lower() for source in sources)
    if subdirectory or build:
        joined += json.dumps([subdirectory, *build])
    return f"{directory}/{hashlib.sha256(joined.encode()).hexdigest()[:16]}"


class Artifact:
    """One release on one host as a resource.

    :param params: options of the module ``artifact``
    """

    predicting = False

    def __init__(self, host: Host, params: t.Mapping[str, t.Any], fetch: Fetch | None = None) -> None:
        self.host, self.fetch = host, fetch
        self.sources = [dict(source) for source in params["sources"]]
        if not self.sources:
            raise Refused("sources", [], "there is nothing to install", "Name an archive or package and its SHA-256")
        for index, source in enumerate(self.sources):
            self._check(f"sources[{index}]", source)
        # The action plugin asks with this before it brings files, and without it after.
        self.coming = bool(params.get("from_controller"))
        self.directory = _absolute("directory", params["directory"])
        self.subdirectory = str(params.get("subdirectory") or "").strip("/")
        if ".." in self.subdirectory.split("/"):
            raise Refused("subdirectory", params["subdirectory"], "leaves the archive", "Name a directory inside of it")
        self.build = [str(command) for command in params.get("build") or []]
        if self.build and len(self.sources) != 1:
            raise Refused(
                "build", self.build, "more than one source would be built", "Give one archive of the source tree"
            )
        self.provides = [str(name).strip("/") for name in params.get("provides") or []]
        self.timeout = int(params.get("build_timeout_seconds") or 14400)
        self.path = release_path(self.directory, self.sources, self.subdirectory, self.build)

    @staticmethod
    def _check(option: str, source: dict[str, t.Any]) -> None:
        digest = str(source.get("sha256") or "").lower()
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise Refused(f"{option}.sha256", source.get("sha256"), "not a SHA-256", "Give 64 hexadecimal digits")
        source["sha256"] = digest
        src = str(source["src"])
        if not _URL.match(src) and not src.startswith("/"):
            raise Refused(
                f"{option}.src", shown(src), "neither an absolute path nor a URL", "Write /path or https://..."
            )
        kind = source.get("kind")
        if not kind:
            found = [kind for kind, ends in _KINDS.items() if src.endswith(ends)]
            if not found:
                known = ", ".join(end for ends in _KINDS.values() for end in ends)
                raise Refused(
                    f"{option}.src",
                    shown(src),
                    "the name does not tell what it is",
                    f"Known endings: {known}; or set kind",
                )
            source["kind"] = found[0]

    # -- observe and plan ----------------------------------------------------------

    def observe(self) -> dict[str, t.Any]:
        """Whether the release is there, and if not, what the files on this host are."""
        present = self.host.exists(f"{self.path}/{RECORD}")
        files: dict[str, str | None] = {}
        for source in self.sources if not present else ():
            if not _URL.match(source["src"]) and not self.coming:
                files[source["src"]] = self._digest(source["src"])
        return {"present": present, "files": files}

    def _digest(self, path: str) -> str | None:
        try:
            return sha256_of(self.host.path(path))
        except OSError:
            return None

    def plan(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        """Install what is missing; a file that is not the one that was pinned is refused before anything is unpacked."""
        if observed["present"]:
            return []
        for index, source in enumerate(self.sources):
            if source["src"] not in observed["files"]:
                continue
            digest = observed["files"][source["src"]]
            if digest is None and not self.predicting:
                raise Refused(
                    f"sources[{index}].src", source["src"], "no such file on this host", "Bring it there, or give a URL"
                )
            if digest is not None and digest != source["sha256"]:
                raise Refused(
                    f"sources[{index}].sha256",
                    source["sha256"],
                    f"checksum mismatch: {source['src']} has {digest}",
                    "Fetch the file again, or give the digest of this one if you trust it",
                )
        return [Step("build and install" if self.build else "install", self.path, after=self._made_of())]

    def _made_of(self) -> list[dict[str, str]]:
        return [{"src": shown(source["src"]), "sha256": source["sha256"]} for source in self.sources]

    # -- apply -----------------------------------------------------------------------

    def apply(self, step: Step) -> None:
        """Unpack everything beside its place and move it there as the last act."""
        os.makedirs(self.host.path(self.directory), mode=0o755, exist_ok=True)
        work = tempfile.mkdtemp(prefix=".unpack-", dir=self.host.path(self.directory))
        try:
            tree = os.path.join(work, "tree")
            os.mkdir(tree, 0o755)
            for number, source in enumerate(self.sources):
                file = self._fetch(source, os.path.join(work, f"source{number}"))
                self._unpack(source["kind"], file, tree)
            top = self._top(tree)
            for command in self.build:
                self.host.run(["sh", "-euc", f'cd "$0" && {command}', top], timeout_seconds=self.timeout)
            missing = [name for name in self.provides if not os.path.lexists(os.path.join(top, name))]
            if missing:
                raise HostError(
                    f"{', '.join(source['src'] for source in self._made_of())} has no {', '.join(missing)} "
                    f"below {self.subdirectory or 'its top'}. Set subdirectory to where they are"
                )
            with open(os.path.join(top, RECORD), "w", encoding="utf-8") as record:
                json.dump(self._made_of(), record)
            os.chmod(top, 0o755)
            # After a power cut the name may be there without the data, and counts as installed for ever.
            self.host.run(["sync", "--file-system", top], timeout_seconds=600)
            shutil.rmtree(self.host.path(self.path), ignore_errors=True)
            os.rename(top, self.host.path(self.path))
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _fetch(self, source: t.Mapping[str, t.Any], target: str) -> str:
        """The real path of a file whose digest is the pinned one."""
        src = source["src"]
        if not _URL.match(src):
            found = self._digest(src)
            target = self.host.path(src)
        else:
            try:
                if self.fetch is None:
                    raise OSError("nothing that fetches was given")
                with self.fetch(src, 60) as answer, open(target, "wb") as file:
                    shutil.copyfileobj(answer, file, _BLOCK)
            except OSError as error:  # URLError is one
                raise HostError(
                    f"{shown(src)} cannot be fetched: {error}. Check the URL, or bring the file to the host"
                ) from error
            found = sha256_of(target)
        if found != source["sha256"]:
            raise HostError(
                f"checksum mismatch: {shown(src)} has {found} instead of {source['sha256']}. Nothing was installed"
            )
        return target

    def _unpack(self, kind: str, file: str, tree: str) -> None:
        if kind == "archive":
            argv = ["tar", "--extract", "--no-same-owner", "--file", file, "--directory", tree]
        elif kind == "image":
            _unpack_image(self.host, file, tree)
            return
        else:
            with open(file, "rb") as head:
                deb = head.read(8) == b"!<arch>\n"
            argv = (
                ["dpkg-deb", "--extract", file, tree]
                if deb
                else ["sh", "-ec", 'cd "$1" && rpm2cpio "$0" | cpio -idm', file, tree]
            )
        self.host.run(argv, timeout_seconds=600)

    def _top(self, tree: str) -> str:
        """The directory that becomes the release; one directory alone at the top of an archive is stepped into."""
        top = os.path.join(tree, self.subdirectory)
        if not os.path.isdir(top):
            raise HostError(f"no directory {self.subdirectory} in {shown(self.sources[0]['src'])}")
        names = os.listdir(top)
        if (
            self.subdirectory
            or len(names) != 1
            or names[0] in _HIERARCHY
            or not os.path.isdir(os.path.join(top, names[0]))
        ):
            return top
        return os.path.join(top, names[0])

    def result(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """Where the release is."""
        missing = [path for path, digest in observed["files"].items() if digest is None]
        return {
            "path": self.path,
            "installed": observed["present"],
            "warnings": [f"{path} is not on this host yet; a real run needs it" for path in missing],
        }


def _unpack_image(host: Host, file: str, tree: str) -> None:
    """The file system of an image in docker's archive format: its layers in order, with what each one deletes."""
    unpacked = f"{tree}.image"
    os.mkdir(unpacked)
    try:
        host.run(["tar", "--extract", "--file", file, "--directory", unpacked], timeout_seconds=600)
        try:
            with open(os.path.join(unpacked, "manifest.json"), encoding="utf-8") as manifest:
                layers = [str(name) for name in json.load(manifest)[0]["Layers"]]
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise HostError(
                f"{file} is no image archive: {error!r}. Make it with podman save or docker save"
            ) from error
        for layer in layers:
            path = os.path.join(unpacked, layer)
            names = host.run(["tar", "--list", "--file", path], timeout_seconds=600).stdout.splitlines()
            for name in names:
                head, base = os.path.split(name.rstrip("/"))
                if base == ".wh..wh..opq":
                    shutil.rmtree(os.path.join(tree, head), ignore_errors=True)
                elif base.startswith(".wh."):
                    gone = os.path.join(tree, head, base[4:])
                    if os.path.isdir(gone) and not os.path.islink(gone):
                        shutil.rmtree(gone)
                    elif os.path.lexists(gone):
                        os.unlink(gone)
            argv = ["tar", "--extract", "--no-same-owner", "--exclude=.wh.*", "--exclude=dev/*"]
            host.run([*argv, "--file", path, "--directory", tree], timeout_seconds=600)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def _absolute(option: str, value: t.Any) -> str:
    path = str(value).rstrip("/")
    if not path.startswith("/") or ".." in path.split("/"):
        raise Refused(option, value, "not an absolute path", "Write a path from / on, such as /opt/3fs/releases")
    return path
