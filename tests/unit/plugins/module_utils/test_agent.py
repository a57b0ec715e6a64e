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


# In a mount namespace of its own: a disk that is mounted here, or is the upper layer of an overlay that was mounted elsewhere.
ON_A_LOOP_DEVICE = """
import importlib.machinery, importlib.util, os, subprocess, sys
loader = importlib.machinery.SourceFileLoader("agent", sys.argv[1])
agent = importlib.util.module_from_spec(importlib.util.spec_from_loader("agent", loader))
loader.exec_module(agent)
top, filesystem, loop = sys.argv[2:]
call = lambda *words: subprocess.run(words, check=True)
agent.GROWN, agent.disk = f"{top}/grown", lambda serial, size: loop
call(f"mkfs.{filesystem}", "-q", loop)
call("mount", loop, f"{top}/data")
for name in ("upper", "work", "lower"):
    os.makedirs(f"{top}/data/{name}", exist_ok=True)
call("mount", "-t", "overlay", "-o", f"lowerdir={top}/lower,upperdir={top}/data/upper,workdir={top}/data/work", "x", f"{top}/root")
call("umount", "-l", f"{top}/data")
os.truncate(f"{top}/disk", 700 << 20)
call("losetup", "--set-capacity", loop)
wish = {"networks": [], "shares": [], "volumes": [f"root {filesystem} {700 << 20}"]}
size = lambda: print(os.statvfs(f"{top}/root").f_blocks * os.statvfs(f"{top}/root").f_frsize >> 20)
size()
agent.use(wish)
size()
agent.use(wish)
size()
print(sum(f"{top}/grown" in line for line in open("/proc/mounts")))
"""


@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_a_file_system_grows_with_its_volume_wherever_it_is_mounted(tmp_path: Path, filesystem: str) -> None:
    programs = [f"mkfs.{filesystem}", "losetup", {"ext4": "resize2fs", "xfs": "xfs_growfs"}[filesystem]]
    if os.geteuid() or not all(map(shutil.which, programs)):
        pytest.skip(f"root, {', '.join(programs)} are needed")
    capabilities = Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0]
    if filesystem == "ext4" and not int(capabilities, 16) >> 24 & 1:
        pytest.skip("ext4 grows with CAP_SYS_RESOURCE only")
    for name in ("data", "lower", "root"):
        (tmp_path / name).mkdir()
    with open(tmp_path / "disk", "wb") as file:
        file.truncate(350 << 20)
    made = subprocess.run(
        ["losetup", "--find", "--show", tmp_path / "disk"], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip("a loop device is needed")
    loop = made.stdout.strip()
    try:
        words = [
            "unshare",
            "--mount",
            sys.executable,
            "-c",
            ON_A_LOOP_DEVICE,
            str(AGENT),
            str(tmp_path),
            filesystem,
            loop,
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)
    assert done.returncode == 0, done.stderr
    before, after, again, mounts = map(int, done.stdout.split())
    assert before < 350 < 600 < after == again and mounts == 0


def test_a_disk_is_awaited_until_it_has_its_size(agent: t.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, serial, sectors in (("vda", "agentfleet-config", 1), ("vdb", "data", 2048)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "serial").write_text(serial)
        (tmp_path / name / "size").write_text(f"{sectors}\n")
    monkeypatch.setattr(agent, "paths", lambda _directory, beginning: sorted(map(str, tmp_path.glob(f"{beginning}*"))))
    assert agent.disk("data", 1 << 20) == "/dev/vdb"
    for serial, size in (("data", 2 << 20), ("gone", 512)):
        with pytest.raises(OSError, match=f"no disk {serial} has {size} bytes"):
            agent.disk(serial, size)
    monkeypatch.setattr(agent, "ATTACH_SECONDS", 0)
    with pytest.raises(OSError, match="no disk data has 2097152 bytes"):
        agent.use({"networks": [], "shares": [], "volumes": ["data ext4 2097152"]})


@pytest.mark.parametrize(
    ("filesystem", "command"), [("ext4", "resize2fs /dev/vdb"), ("xfs", "xfs_growfs {grown}")], ids=["ext4", "xfs"]
)
def test_a_file_system_is_mounted_no_longer_than_it_grows(
    agent: t.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filesystem: str, command: str
) -> None:
    grown, called = str(tmp_path / "grown"), []

    def fails(*words: str) -> None:
        called.append(words)
        raise OSError("No space left")

    monkeypatch.setattr(agent, "GROWN", grown)
    monkeypatch.setattr(agent, "disk", lambda serial, size: {("data", 1 << 20): "/dev/vdb"}[serial, size])
    monkeypatch.setattr(agent, "libc", lambda *words: called.append(words))
    monkeypatch.setattr(agent, "run", fails)
    status, told = ask(
        agent,
        post("/attached", {"networks": [], "shares": [], "volumes": [f"data {filesystem} 1048576"]}),
        trusted=True,
    )
    assert (status[-25:], told) == ("500 Internal Server Error", {"error": "OSError: No space left"})
    words = tuple(command.format(grown=grown).split())
    assert called == [("mount", "/dev/vdb", grown, filesystem, 0, 0), words, ("umount2", grown, 0)]


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


def test_cpus_are_up_as_soon_as_the_kernel_has_them(
    agent: t.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def paths(directory: str, beginning: str) -> list[str]:
        looks.append(1)
        if len(looks) == 3:
            (tmp_path / "cpu1").mkdir()
            (tmp_path / "cpu1/online").write_text("0\n")
        return sorted(map(str, tmp_path.glob(f"{beginning}*")))

    (tmp_path / "cpu0").mkdir()  # that cannot be switched off, and has no such file
    monkeypatch.setattr(agent, "paths", paths)
    monkeypatch.setattr(agent.os, "cpu_count", lambda: 1 + len(list(tmp_path.glob("cpu1"))))
    agent.use({"cpus": 2, "networks": [], "shares": []})
    assert len(looks) == 3 and (tmp_path / "cpu1/online").read_text() == "1"
    monkeypatch.setattr(agent, "ATTACH_SECONDS", 0)
    with pytest.raises(OSError, match="2 of 3 CPUs are there"):
        agent.use({"cpus": 3, "networks": [], "shares": []})


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
