# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host as files and commands, below a root directory that tests can choose.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

import errno
import fcntl
import glob as _glob
import json
import os
import stat
import subprocess
import tempfile
import time
import typing as t
from contextlib import contextmanager
from dataclasses import dataclass

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError


@dataclass(frozen=True)
class Completed:
    """What a command left behind."""

    argv: tuple[str, ...]
    rc: int
    stdout: str = ""
    stderr: str = ""

    @property
    def text(self) -> str:
        """Both outputs in one line, for error messages."""
        return " ".join((self.stderr + " " + self.stdout).split())


Runner = t.Callable[[t.Sequence[str], "str | None", float], Completed]


def run_process(argv: t.Sequence[str], stdin: str | None, timeout_seconds: float) -> Completed:
    """Run a command with a bounded wait and the C locale, an ordinary user's in sbin, too; a missing program has rc 127."""
    try:
        # There is no AnsibleModule at boot and in tests.
        done = subprocess.run(  # pylint: disable=ansible-bad-function
            list(argv),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            check=False,
            env={**os.environ, "LC_ALL": "C", "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"},
        )
    except FileNotFoundError:
        return Completed(tuple(argv), 127, "", f"{argv[0]}: not found")
    except subprocess.TimeoutExpired:
        return Completed(tuple(argv), 124, "", f"no end after {timeout_seconds:g} s")
    return Completed(tuple(argv), done.returncode, done.stdout, done.stderr)


class Host:
    """Files below ``root`` and commands through ``runner``.

    :param root: directory that stands for ``/`` (tests use a temporary one)
    :param runner: runs commands; tests give a function that answers from a table
    """

    def __init__(self, root: str = "/", runner: Runner = run_process) -> None:
        self.root = root
        self._runner = runner

    # -- reading: a missing file is an answer, not an error ------------------

    def path(self, path: str) -> str:
        """The real path of a host path."""
        return os.path.join(self.root, path.lstrip("/"))

    def read(self, path: str, default: str = "") -> str:
        """A file's text without surrounding white space, or ``default``."""
        found = self.text(path)
        return default if found is None else found.strip()

    def text(self, path: str) -> str | None:
        """A file's exact text; None when there is none, or it cannot be read."""
        try:
            with open(self.path(path), encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError:
            return None

    def read_int(self, path: str, default: int | None = None) -> int | None:
        """A file's number (decimal or 0x), or ``default``."""
        try:
            return int(self.read(path), 0)
        except ValueError:
            return default

    def memory_bytes(self) -> int:
        """The machine's RAM; 0 if unknown."""
        for line in self.read("/proc/meminfo").splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
        return 0

    def has_program(self, name: str) -> bool:
        """Whether a program is where commands are looked for."""
        places = ("/usr/bin", "/usr/sbin", "/bin", "/sbin", "/usr/local/bin")
        return any(self.exists(f"{place}/{name}") for place in places)

    def exists(self, path: str) -> bool:
        """Whether the path exists (a broken link does)."""
        return os.path.lexists(self.path(path))

    def names(self, path: str) -> list[str]:
        """A directory's entries in natural order (node2 before node10); none if missing."""
        try:
            return sorted(os.listdir(self.path(path)), key=natural_key)
        except OSError:
            return []

    def glob(self, pattern: str) -> list[str]:
        """Host paths that match, in natural order."""
        prefix = self.path("/").rstrip("/")
        found = _glob.glob(self.path(pattern))
        return sorted((name[len(prefix) :] for name in found), key=natural_key)

    def link_name(self, path: str) -> str:
        """The last component of what a symbolic link points to, or the empty string."""
        try:
            return os.path.basename(os.readlink(self.path(path)))
        except OSError:
            return ""

    def mode(self, path: str) -> int:
        """The permissions of a file or directory, links followed; 0 if missing."""
        try:
            return stat.S_IMODE(os.stat(self.path(path)).st_mode)
        except OSError:
            return 0

    # -- writing -------------------------------------------------------------

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Replace a regular file atomically (temporary file, fsync, rename)."""
        target = self.path(path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=".agentfleet-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, mode)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise

    def poke(self, path: str, value: str) -> None:
        """Write a sysfs or procfs attribute; it must exist."""
        try:
            handle = os.open(self.path(path), os.O_WRONLY)
            try:
                os.write(handle, value.encode())
            finally:
                os.close(handle)
        except OSError as error:
            raise HostError(f"writing {value!r} to {path}: {error.strerror}") from error

    def remove(self, path: str) -> None:
        """Remove a file; a missing one is fine."""
        try:
            os.unlink(self.path(path))
        except FileNotFoundError:
            pass

    # -- what somebody else can write ------------------------------------------

    @contextmanager
    def directory(self, path: str) -> t.Iterator[int]:
        """A directory's descriptor: whatever its owner does meanwhile, what is opened by it is in this directory."""
        handle = open_directory(self.path(path))
        try:
            yield handle
        finally:
            os.close(handle)

    # -- commands ------------------------------------------------------------

    def run(
        self,
        argv: t.Sequence[str],
        stdin: str | None = None,
        timeout_seconds: float = 60,
        check: bool = True,
    ) -> Completed:
        """Run a command; with ``check`` a non-zero exit raises HostError with its text."""
        done = self._runner(argv, stdin, timeout_seconds)
        if check and done.rc != 0:
            raise HostError(f"{' '.join(argv)} failed with exit code {done.rc}: {done.text}")
        return done

    def run_json(self, argv: t.Sequence[str], timeout_seconds: float = 60) -> t.Any:
        """Run a command that prints JSON; no output is an empty list."""
        done = self.run(argv, timeout_seconds=timeout_seconds)
        try:
            return json.loads(done.stdout) if done.stdout.strip() else []
        except ValueError as error:
            raise HostError(f"{' '.join(argv)} printed no JSON: {error}") from error

    def wait(
        self,
        predicate: t.Callable[[], bool],
        what: str,
        timeout_seconds: float,
        interval_seconds: float = 0.2,
    ) -> None:
        """Wait for a predicate, at most ``timeout_seconds``; then HostError names ``what``."""
        end = time.monotonic() + timeout_seconds
        while not predicate():
            if time.monotonic() >= end:
                raise HostError(f"{what}: not within {timeout_seconds:g} seconds")
            time.sleep(interval_seconds)

    @contextmanager
    def lock(self, name: str, timeout_seconds: float | None = None) -> t.Iterator[None]:
        """Hold an exclusive lock, so that two runs do not interleave their writes.

        :param timeout_seconds: how long to wait for who holds it, then HostError; None waits for ever
        """
        path = f"/run/lock/agentfleet-{name}"
        os.makedirs(os.path.dirname(self.path(path)), exist_ok=True)
        with open(self.path(path), "w", encoding="utf-8") as file:
            if timeout_seconds is None:
                fcntl.flock(file, fcntl.LOCK_EX)
            else:
                what = f"the end of another call, which holds {path} (lslocks names its process; end it if it hangs)"
                self.wait(lambda: _locked(file.fileno()), what, timeout_seconds)
            yield


def sync(path: str) -> None:
    """Have a file, or a directory's entries, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    import hashlib  # most who have a host need it not

    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def open_directory(name: str, beneath: int | None = None) -> int:
    """A descriptor of a directory, which must be no link to one.

    :param beneath: the directory that it is in; ``name`` is a path without it
    """
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=beneath)


def open_beneath(directory: int, name: str, flags: int = os.O_RDONLY, or_ours: bool = False) -> t.IO[bytes]:
    """Open a file in a directory that somebody else owns, who cannot lead us elsewhere.

    The file is a regular one and the directory owner's: no link, which points to what only we may open, and no FIFO,
    which would hold us. A new one has mode 0600.

    :param flags: ``O_RDONLY`` or ``O_RDWR``, and what else ``os.open`` takes
    :param or_ours: it may also be ours
    :raises HostError: it is something else
    """
    try:
        handle = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=directory)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise HostError(f"{name}: a link, which is not followed. Put the file itself there") from error
    found, owner = os.fstat(handle), os.fstat(directory).st_uid
    if stat.S_ISREG(found.st_mode) and (found.st_uid == owner or (or_ours and found.st_uid == os.geteuid())):
        return os.fdopen(handle, "r+b" if flags & os.O_RDWR else "rb")
    os.close(handle)
    raise HostError(
        f"{name}: no regular file of user {owner}, who owns its directory (it is user {found.st_uid}'s). See what it is, "
        "and give it to that user"
    )


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def natural_key(text: str) -> list[tuple[int, str]]:
    """Sort key under which ``node2`` comes before ``node10``."""
    key: list[tuple[int, str]] = []
    digits = ""
    for character in text + "\0":
        if character.isdigit():
            digits += character
            continue
        if digits:
            key.append((int(digits), ""))
            digits = ""
        key.append((-1, character))
    return key
