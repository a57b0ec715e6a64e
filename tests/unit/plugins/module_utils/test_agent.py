# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The agent of the images: what it answers to whom, and that it can become another microVM."""

from __future__ import annotations

import errno
import importlib.machinery
import importlib.util
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import typing as t
from pathlib import Path

import pytest

AGENT = Path(__file__).resolve().parents[4] / "roles/rootfs/files/agent"
LINES = {
    "before": "02:00:00:00:00:01 10.9.0.5/24,fd00::5/64 10.9.0.1",
    "after": "02:00:00:00:00:02 10.9.0.6/24,fd00::6/64 10.9.0.1,fd00::1",
}
# Runs in a network namespace of its own: a device with the first line's addresses gets those of the second.
IN_NAMESPACE = f"""
import importlib.machinery, importlib.util, json, subprocess, sys
loader = importlib.machinery.SourceFileLoader("agent", sys.argv[1])
agent = importlib.util.module_from_spec(importlib.util.spec_from_loader("agent", loader))
loader.exec_module(agent)
def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
ip("link", "add", "net0", "type", "veth", "peer", "name", "net1")
ip("link", "set", "net1", "up")
ip("link", "set", "net0", "address", "02:00:00:00:00:01", "up")
ip("addr", "add", "10.9.0.5/24", "dev", "net0")
ip("addr", "add", "fd00::5/64", "dev", "net0", "nodad")
ip("route", "add", "default", "via", "10.9.0.1")
before, after = {LINES["before"].split()!r}, {LINES["after"].split()!r}
agent.readdress(before, after)
agent.readdress(before, after)
link = json.loads(ip("-json", "addr", "show", "net0"))[0]
routes = json.loads(ip("-json", "route")) + json.loads(ip("-json", "-6", "route"))
print(json.dumps([link["address"], sorted(a["local"] for a in link["addr_info"] if a["scope"] == "global"),
    sorted(r["gateway"] for r in routes if r["dst"] == "default")]))
"""


# Runs in a mount namespace of its own: tmpfs for virtiofs, which needs another end.
IN_MOUNTS = """
import importlib.machinery, importlib.util, json, os, sys
loader = importlib.machinery.SourceFileLoader("agent", sys.argv[1])
agent = importlib.util.module_from_spec(importlib.util.spec_from_loader("agent", loader))
loader.exec_module(agent)
libc = agent.libc
agent.libc = lambda name, *words: libc(name, *(word if word != "virtiofs" else "tmpfs" for word in words))
mounts = lambda: [line.split()[:4] for line in open("/proc/mounts") if sys.argv[2] in line]
wish = {"networks": [], "shares": [f"models {sys.argv[2]}/a/models ro", f"scratch {sys.argv[2]}/scratch rw"]}
agent.use(wish)
agent.use(wish)
told = [mounts()]
gone = {"targets": [f"{sys.argv[2]}/a/models"]}
busy = open(f"{sys.argv[2]}/scratch/file", "w")
agent.let_go(gone)
agent.let_go(gone)
told.append(mounts())
try:
    agent.let_go({"targets": [f"{sys.argv[2]}/scratch"]})
except OSError as error:
    told.append(str(error))
print(json.dumps(told))
"""


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: t.Any) -> t.Any:
    """The agent as a module, with its files below a temporary directory."""
    loader = importlib.machinery.SourceFileLoader("agent", str(AGENT))
    spec = importlib.util.spec_from_loader("agent", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    (tmp_path / "etc").mkdir()
    monkeypatch.setattr(module, "MACHINE_ID", str(tmp_path / "etc/machine-id"))
    monkeypatch.setattr(module, "HOSTNAME", str(tmp_path / "etc/hostname"))
    monkeypatch.setattr(module, "HOOKS", str(tmp_path / "hooks"))
    return module


def ask(agent: t.Any, request: bytes, trusted: bool) -> tuple[str, dict[str, t.Any]]:
    ours, its = socket.socketpair()
    answering = threading.Thread(target=agent.guarded, args=(its, trusted))
    answering.start()
    with ours:
        ours.settimeout(10)
        for part in (request[:10], request[10:]):  # requests come in pieces
            ours.sendall(part)
        answer = b""
        while chunk := ours.recv(65536):
            answer += chunk
    answering.join()
    head, _end, body = answer.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0].decode(), json.loads(body)


def post(path: str, body: t.Any) -> bytes:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"POST {path} HTTP/1.0\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text


def test_everybody_may_ask_what_it_is(agent: t.Any) -> None:
    status, told = ask(agent, b"GET / HTTP/1.0\r\n\r\n", trusted=False)
    assert status == "HTTP/1.0 200 OK"
    assert told["hostname"] == socket.gethostname()
    assert told["memory_total_bytes"] > 0


def test_it_tells_which_scripts_of_the_first_boot_failed(
    agent: t.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "FIRST_BOOT_FAILED", str(tmp_path / "firstboot-failed"))
    assert agent.describe()["first_boot_failed"] == ""
    (tmp_path / "firstboot-failed").write_text(" 10-keys user-data\n")
    assert agent.describe()["first_boot_failed"] == "10-keys user-data"


@pytest.mark.parametrize("path", ["/identity", "/poweroff", "/detaching"])
def test_only_the_host_may_change_it(agent: t.Any, monkeypatch: t.Any, path: str) -> None:
    called: list[str] = []
    monkeypatch.setattr(agent, "become", lambda wish: called.append("become"))
    monkeypatch.setattr(agent, "power_off", lambda: called.append("power_off"))
    monkeypatch.setattr(agent, "let_go", lambda wish: called.append("let_go"))
    status, told = ask(agent, post(path, {}), trusted=False)
    assert status == "HTTP/1.0 403 Forbidden"
    assert "over vsock" in told["error"]
    assert called == []
    ask(agent, post(path, {}), trusted=True)
    assert called == [{"/identity": "become", "/poweroff": "power_off", "/detaching": "let_go"}[path]]


def test_what_is_no_request_changes_nothing(agent: t.Any, monkeypatch: t.Any) -> None:
    monkeypatch.setattr(agent, "become", lambda wish: pytest.fail("called"))
    assert ask(agent, b"GET /identity HTTP/1.0\r\n\r\n", trusted=True)[0] == "HTTP/1.0 404 Not Found"
    assert ask(agent, post("/identity", b"{"), trusted=True)[0] == "HTTP/1.0 500 Internal Server Error"


def test_identity_starts_with_randomness_and_ends_with_the_hooks(
    agent: t.Any, monkeypatch: t.Any, tmp_path: Path
) -> None:
    order: list[str] = []
    requests: list[t.Any] = []

    def ioctl(_file: t.Any, request: int, data: bytes = b"") -> int:
        order.append(f"{request:#x}")
        requests.append(data)
        return 0

    monkeypatch.setattr(agent.fcntl, "ioctl", ioctl)
    monkeypatch.setattr(agent.time, "clock_settime", lambda clock, now: order.append(f"clock {now}"))
    monkeypatch.setattr(agent.socket, "sethostname", lambda name: order.append(f"hostname {name}"))
    monkeypatch.setattr(agent, "readdress", lambda before, after: order.append(f"{before[0]} -> {after[0]}"))
    monkeypatch.delenv("ROLE", raising=False)
    (tmp_path / "hooks").mkdir()
    hook = tmp_path / "hooks/10-keys"
    hook.write_text(f"#!/bin/sh\necho $ROLE >{tmp_path}/hooked\n")
    hook.chmod(0o755)
    wish = {
        "hostname": "worker", "machine_id": "ab" * 16, "networks": [["m1 10.0.0.2/24", "m2 10.0.0.3/24"]],
        "environment": {"ROLE": "reviewer"}, "entropy": "00ff" * 32, "time": 1700000000.5, "power_off": "b",
    }  # fmt: skip
    agent.become(wish)
    assert order == ["0x40085203", "0x5207", "clock 1700000000.5", "hostname worker", "m1 -> m2"]
    assert requests[0] == (512).to_bytes(4, sys.byteorder) + (64).to_bytes(4, sys.byteorder) + b"\x00\xff" * 32
    assert (tmp_path / "etc/machine-id").read_text() == "ab" * 16 + "\n"
    assert (tmp_path / "etc/hostname").read_text() == "worker\n"
    assert (tmp_path / "hooked").read_text() == "reviewer\n"
    hook.write_text("#!/bin/sh\necho no key >&2\nexit 3\n")
    with pytest.raises(OSError, match="10-keys ended with 3: no key"):
        agent.become(wish)
    os.environ.pop("ROLE")
    trigger: list[tuple[str, str]] = []
    monkeypatch.setattr(agent.os, "sync", lambda: trigger.append(("sync", "")))
    monkeypatch.setattr(agent, "write", lambda path, text: trigger.append((path, text)))
    agent.power_off()
    assert trigger == [("sync", ""), ("/proc/sysrq-trigger", "b")]


@pytest.mark.skipif(
    not (shutil.which("unshare") and shutil.which("ip"))
    or subprocess.run(
        ["unshare", "-rn", "ip", "link", "add", "probe0", "type", "veth", "peer", "name", "probe1"],
        capture_output=True,
        check=False,
    ).returncode
    != 0,
    reason="this machine lets us make no network namespace with a veth pair",
)
def test_the_kernel_takes_the_new_addresses_and_twice_is_once() -> None:
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, "-c", IN_NAMESPACE, str(AGENT)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        "02:00:00:00:00:02", ["10.9.0.6", "fd00::6"], ["10.9.0.1", "fd00::1"],
    ]  # fmt: skip


@pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "x", "/mnt"], capture_output=True, check=False
    ).returncode,
    reason="this machine lets us mount nothing",
)
def test_shares_are_mounted_once_and_let_go_when_nothing_uses_them(tmp_path: Path) -> None:
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", IN_MOUNTS, str(AGENT), str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    )
    mounted, left, refusal = json.loads(done.stdout)
    assert [(line[0], line[1], line[3][:2]) for line in mounted] == [
        ("models", f"{tmp_path}/a/models", "ro"), ("scratch", f"{tmp_path}/scratch", "rw"),
    ]  # fmt: skip
    assert [line[0] for line in left] == ["scratch"]
    assert refusal == f"[Errno 16] umount2 {tmp_path}/scratch 0: Device or resource busy"


def test_a_share_is_mounted_as_soon_as_the_kernel_has_its_device(
    agent: t.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [OSError(errno.EINVAL, "no such tag"), OSError(errno.EINVAL, "no such tag"), None]

    def mount(*_words: t.Any) -> None:
        if what := said.pop(0):
            raise what

    monkeypatch.setattr(agent, "libc", mount)
    wish = {"networks": [], "shares": [f"models {tmp_path} ro"]}
    agent.use(wish)
    assert said == []
    monkeypatch.setattr(agent, "ATTACH_SECONDS", 0)
    said = [OSError(errno.EINVAL, "no such tag")] * 2
    with pytest.raises(OSError, match="no such tag"):
        agent.use(wish)


def test_an_image_is_found_by_its_uuid_and_only_used_with_dax(
    agent: t.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, byte in (("pmem0", b"\1"), ("pmem1", b"\2")):
        (tmp_path / name).write_bytes(bytes(1072) + byte * 16)
    monkeypatch.setattr(agent, "paths", lambda _directory, beginning: sorted(map(str, tmp_path.glob(f"{beginning}*"))))
    monkeypatch.setattr(agent, "ATTACH_SECONDS", 0)
    called: list[t.Any] = []
    monkeypatch.setattr(agent, "libc", lambda *words: called.append(words))
    target = str(tmp_path / "opt/model")
    mounts = f"/dev/pmem1 {target} erofs ro,dax=always 0 0\n"
    monkeypatch.setattr(agent, "read", lambda path, default="": mounts if path == "/proc/mounts" else default)
    wish = {"networks": [], "shares": [], "images": [f"{'02' * 16} {target} erofs ro,dax=always"]}
    agent.use(wish)
    mounted = ("mount", str(tmp_path / "pmem1"), target, "erofs", agent.MS_RDONLY, "dax=always")
    assert called == [mounted] and os.path.isdir(target)
    mounts = mounts.replace(",dax=always", "")
    with pytest.raises(OSError, match="opt/model is mounted without DAX"):
        agent.use(wish)
    assert called[1:] == [mounted, ("umount2", target, 0)]
    with pytest.raises(OSError, match="no pmem device has the image 0303"):
        agent.use({**wish, "images": [f"{'03' * 16} {target} erofs ro"]})


def test_a_network_is_up_as_soon_as_the_kernel_has_its_device(agent: t.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there = [[], [], [(7, "eth1")]]
    monkeypatch.setattr(agent.socket, "if_nameindex", lambda: there.pop(0))
    monkeypatch.setattr(agent, "mac_of", lambda _name: "02:00:00:00:00:02")
    asked: list[t.Any] = []
    monkeypatch.setattr(
        agent, "netlink", lambda _kernel, kind, _flags, body, *_more, **_also: asked.append((kind, body))
    )
    agent.use({"networks": ["02:00:00:00:00:02 10.9.0.6/24"], "shares": []})
    assert there == [] and asked[0] == (agent.RTM_NEWLINK, struct.pack("=BxHiII", 0, 0, 7, 0, agent.IFF_UP))


def test_a_device_that_is_not_there_is_named(agent: t.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "ATTACH_SECONDS", 0)
    with pytest.raises(OSError, match="no network device has the MAC 02:00:00:00:00:01"):
        agent.readdress(LINES["before"].split(), LINES["after"].split())
