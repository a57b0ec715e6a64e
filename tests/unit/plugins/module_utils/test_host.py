# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Files and commands of a host below a chosen root."""

from __future__ import annotations

import os
import stat
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._host import (
    Host,
    natural_key,
    open_beneath,
    open_directory,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError


def test_what_is_missing_is_an_answer(fake_host: t.Any) -> None:
    assert fake_host.read("/proc/none", "-") == "-"
    assert fake_host.read_int("/proc/none") is None
    assert fake_host.names("/sys/none") == []
    assert fake_host.link_name("/sys/none") == ""


def test_numbers_are_read_in_both_notations(fake_host: t.Any) -> None:
    fake_host.files({"/a": "42\n", "/b": "0x10", "/c": "many"})
    assert [fake_host.read_int(path) for path in ("/a", "/b", "/c")] == [42, 16, None]


def test_entries_come_in_natural_order(fake_host: t.Any) -> None:
    fake_host.files({f"/sys/node{n}/x": "" for n in (10, 2, 1)})
    assert fake_host.names("/sys") == ["node1", "node2", "node10"]
    assert fake_host.glob("/sys/node*") == ["/sys/node1", "/sys/node2", "/sys/node10"]
    assert sorted(["0000:10:00.0", "0000:9:00.0"], key=natural_key) == ["0000:9:00.0", "0000:10:00.0"]


def test_a_write_replaces_the_whole_file_with_its_mode(fake_host: t.Any) -> None:
    fake_host.write("/etc/new/file", "one\n", 0o600)
    path = fake_host.path("/etc/new/file")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    fake_host.write("/etc/new/file", "two\n", 0o600)
    assert fake_host.read("/etc/new/file") == "two" and os.listdir(os.path.dirname(path)) == ["file"]


def test_a_failed_write_leaves_the_old_file_and_no_debris(fake_host: t.Any, monkeypatch: t.Any) -> None:
    fake_host.write("/etc/file", "one\n")

    def full(*_paths: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        fake_host.write("/etc/file", "two\n")
    assert fake_host.read("/etc/file") == "one" and fake_host.names("/etc") == ["file"]


def test_poking_a_missing_attribute_names_it(fake_host: t.Any) -> None:
    with pytest.raises(HostError, match="writing '1' to /sys/none/attribute: No such file"):
        fake_host.poke("/sys/none/attribute", "1")


def test_real_commands_are_bounded_and_speak_c(tmp_path: t.Any) -> None:
    host = Host(str(tmp_path))
    assert host.run(["sh", "-c", "echo $LC_ALL; cat"], stdin="in").stdout == "C\nin"
    assert host.run(["agentfleet-no-such-program"], check=False).rc == 127
    with pytest.raises(HostError, match="exit code 124: no end after 0.1 s"):
        host.run(["sleep", "5"], timeout_seconds=0.1)
    with pytest.raises(HostError, match="sh -c echo why >&2; exit 3 failed with exit code 3: why"):
        host.run(["sh", "-c", "echo why >&2; exit 3"])


def test_programs_of_sbin_are_found_as_an_ordinary_user(tmp_path: t.Any, monkeypatch: t.Any) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert Host(str(tmp_path)).run(["sh", "-c", "echo $PATH"]).stdout == "/usr/bin:/bin:/usr/sbin:/sbin\n"


def test_json_output_is_parsed_or_explained(fake_host: t.Any) -> None:
    fake_host.answers = {"cxl list": '[{"memdev":"mem0"}]', "cxl list -R": "", "cxl broken": "oops"}
    assert fake_host.run_json(["cxl", "list"]) == [{"memdev": "mem0"}]
    assert fake_host.run_json(["cxl", "list", "-R"]) == []
    with pytest.raises(HostError, match="cxl broken printed no JSON"):
        fake_host.run_json(["cxl", "broken"])


def test_a_wait_ends_by_itself(fake_host: t.Any) -> None:
    with pytest.raises(HostError, match="node online: not within 0.01 seconds"):
        fake_host.wait(lambda: False, "node online", 0.01, 0.001)


def refused(directory: int, name: str, **options: t.Any) -> str:
    with pytest.raises(HostError) as error:
        open_beneath(directory, name, **options)
    return str(error.value)


def test_what_somebody_else_can_write_leads_nowhere_else(fake_host: t.Any) -> None:
    fake_host.files({"/etc/shadow": "secret", "/run/vm/state": "its state", "/run/vm/inner": None})
    os.symlink(fake_host.path("/etc/shadow"), fake_host.path("/run/vm/link"))
    os.symlink(fake_host.path("/etc"), fake_host.path("/run/vm/elsewhere"))
    os.mkfifo(fake_host.path("/run/vm/fifo"))
    with fake_host.directory("/run/vm") as directory:
        with open_beneath(directory, "state") as file:
            assert file.read() == b"its state"
        assert "link: a link" in refused(directory, "link")
        for name in ("fifo", "inner"):
            assert f"{name}: no regular file" in refused(directory, name)
        with pytest.raises(OSError, match="elsewhere"):
            open_directory("elsewhere", directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_somebody_else_can_write_is_the_owners_or_ours(fake_host: t.Any) -> None:
    fake_host.files({"/run/vm/ours": "", "/run/vm/its": "", "/run/vm/others": ""})
    for path, owner in (("", 61184), ("/its", 61184), ("/others", 61185)):
        os.chown(fake_host.path(f"/run/vm{path}"), owner, -1)
    with fake_host.directory("/run/vm") as directory:
        assert "no regular file of user 61184, who owns its directory (it is user 0's)" in refused(directory, "ours")
        assert "it is user 61185's" in refused(directory, "others", or_ours=True)
        for name in ("ours", "its"):
            open_beneath(directory, name, os.O_RDWR, or_ours=True).close()


def test_a_lock_is_waited_for_within_bounds(fake_host: t.Any) -> None:
    held = pytest.raises(
        HostError, match="another call, which holds /run/lock/agentfleet-microvms .*not within 0 seconds"
    )
    with fake_host.lock("microvms", 0), fake_host.lock("images", 0), held, fake_host.lock("microvms", 0):
        raise AssertionError("two have it")
    with fake_host.lock("microvms", 0):
        pass
