# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The master's HTTP interface. The answers are what mooncake 0.3.13.post1 gave, shortened."""

from __future__ import annotations

import json
import threading
import typing as t
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._mooncake_admin import Admin
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

JOB = {"success": True, "status_name": "RUNNING", "migrated_bytes": 0, "message": "Drain job running"}
SEGMENT = {"segment_name": "10.0.0.1:14230", "size_bytes": 33554432, "status": "OK"}


class Master(BaseHTTPRequestHandler):
    """Answers from a table of the server; a list is answered one by one."""

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.server.asked.append((self.command, self.path, body))  # type: ignore[attr-defined]
        answers = self.server.answers  # type: ignore[attr-defined]
        answer = answers.get(f"{self.command} {self.path}", answers.get(self.path.partition("?")[0], (404, "no")))
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        status, text = answer if isinstance(answer, tuple) else (200, answer)
        self.send_response(status)
        self.end_headers()
        self.wfile.write((text if isinstance(text, str) else json.dumps(text)).encode())

    do_GET = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, *arguments: t.Any) -> None:
        """Say nothing."""


@pytest.fixture
def master() -> t.Iterator[t.Any]:
    server = HTTPServer(("127.0.0.1", 0), Master)
    server.answers, server.asked = {}, []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def pool(master: t.Any, **more: t.Any) -> dict[str, t.Any]:
    where = {"address": "127.0.0.1", "metrics_address": "127.0.0.1", "metrics_port": master.server_port}
    return {"name": "a", "etcd": [], "master": where, **more}


def test_what_stores_hold(master: t.Any) -> None:
    used = {"allocator_used_bytes": 31457280, "allocator_capacity_bytes": 50331648}
    # A store that has grown is there twice, with one account.
    master.answers["/get_segments_detail"] = {"segments": [{**SEGMENT, **used}, {**SEGMENT, "size_bytes": 1, **used}]}
    master.answers["/metrics"] = "# TYPE x gauge\nmaster_key_count 30\n"
    admin = Admin(pool(master))
    assert admin.segments() == {"10.0.0.1:14230": {"used_bytes": 31457280, "capacity_bytes": 50331648, "status": "OK"}}
    assert admin.objects() == 30


def test_a_drain_waits_until_it_is_done(master: t.Any) -> None:
    master.answers["/api/v1/drain_jobs"] = {"success": True, "job_id": "1-2", "status": "CREATED"}
    master.answers["/api/v1/drain_jobs/query"] = [JOB, {**JOB, "status_name": "SUCCEEDED", "migrated_bytes": 7}]
    assert Admin(pool(master)).drain(["10.0.0.1:14230"], 10) == 7
    assert master.asked[0] == ("POST", "/api/v1/drain_jobs", '{"segments": ["10.0.0.1:14230"]}')


def test_a_drain_that_fails_or_hangs_is_an_error(master: t.Any) -> None:
    master.answers["/api/v1/drain_jobs"] = {"success": True, "job_id": "1-2"}
    master.answers["/api/v1/drain_jobs/query"] = {**JOB, "status_name": "FAILED", "message": "no target"}
    with pytest.raises(HostError, match="ended as FAILED: no target"):
        Admin(pool(master)).drain(["s"], 10)
    master.answers["/api/v1/drain_jobs/query"] = JOB
    master.answers["/api/v1/drain_jobs/cancel"] = {"success": True}
    with pytest.raises(HostError, match="not done within 0 seconds and was cancelled"):
        Admin(pool(master)).drain(["s"], 0)
    assert master.asked[-1][1] == "/api/v1/drain_jobs/cancel"


def test_quotas(master: t.Any) -> None:
    tenant = {"tenant_id": "red-1", "requested_quota_bytes": 8, "charged_bytes": 3, "has_explicit_policy": True}
    path = "/api/v1/tenant_quotas"
    master.answers[path] = {"success": True, "data": [tenant, {**tenant, "has_explicit_policy": False}]}
    admin = Admin(pool(master))
    assert admin.quotas() == {"red-1": {"quota_bytes": 8, "used_bytes": 3}}
    admin.set_quota("red-1", 9)
    assert master.asked[-1] == ("PUT", f"{path}?tenant_id=red-1", '{"requested_quota_bytes": 9}')
    master.answers[f"DELETE {path}?tenant_id=red-1"] = (409, {"success": False, "error_message": "TENANT_NOT_EMPTY"})
    with pytest.raises(HostError, match="answered 409 to DELETE /api/v1/tenant_quotas: .*TENANT_NOT_EMPTY"):
        admin.remove_quota("red-1")


def test_the_leader_of_several_masters_is_asked(master: t.Any) -> None:
    master.answers["/leader"] = {"present": True, "leader_address": "127.0.0.1:50051"}
    assert Admin(pool(master, etcd=["h:2379"])).address == "127.0.0.1"
    master.answers["/leader"] = {"present": False, "leader_address": None}
    with pytest.raises(HostError, match="no master of pool a leads"):
        Admin(pool(master, etcd=["h:2379"]))


def test_silence_and_another_program_are_errors(master: t.Any) -> None:
    master.answers["/get_segments_detail"] = "<html>"
    with pytest.raises(HostError, match="is no Mooncake master: '<html>'"):
        Admin(pool(master)).segments()
    master.answers["/metrics"] = "other 1\n"
    with pytest.raises(HostError, match="has no master_key_count"):
        Admin(pool(master)).objects()
    nobody = pool(master)
    nobody["master"]["metrics_port"] = 1
    with pytest.raises(HostError, match="the master at 127.0.0.1:1 does not answer"):
        Admin(nobody).objects()
