# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The master's HTTP interface. The answers are what mooncake 0.3.13.post1 gave, shortened."""

from __future__ import annotations

import json
import threading
import typing as t
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _mooncake_admin
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
    thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
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


class Stores(BaseHTTPRequestHandler):
    """A master's drains, as mooncake 0.3.13.post1 was seen to do them: what is being drained takes nothing, and is 0 bytes."""

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}"))

    def answer(self, body: dict[str, t.Any]) -> None:
        with self.server.lock:  # type: ignore[attr-defined]
            status, text = self.act(self.server, *self.path.partition("?")[::2], body)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(text).encode())

    @staticmethod
    def act(server: t.Any, path: str, query: str, body: dict[str, t.Any]) -> tuple[int, dict[str, t.Any]]:
        stores, job = server.stores, server.jobs.get(query.partition("job_id=")[2])
        server.asked.append(path)
        if path == "/get_segments_detail":
            keys = ("segment_name", "status", "allocator_used_bytes", "allocator_capacity_bytes", "size_bytes")
            rows = [
                (name, state, *((used, 64) if state == "OK" else (0, 0)), 64) for name, (state, used) in stores.items()
            ]
            return 200, {"segments": [dict(zip(keys, row)) for row in rows]}
        if path == "/api/v1/drain_jobs":
            if any(stores[name][0] != "OK" for name in body["segments"]):
                return 409, {"success": False, "error_message": "UNAVAILABLE_IN_CURRENT_STATUS"}
            for name in body["segments"]:
                stores[name][0] = "DRAINING"
            server.jobs[str(len(server.jobs))] = {**JOB, "of": body["segments"]}
            return 200, {"success": True, "job_id": str(len(server.jobs) - 1)}
        if job is None:
            return 400, {"success": False, "error_message": "Missing or invalid job_id"}
        if path.endswith("/cancel"):
            if server.busy:
                server.busy -= 1
                return 409, {"success": False, "error_message": "UNAVAILABLE_IN_CURRENT_STATUS"}
            job["status_name"] = "CANCELED"
            for name in job["of"]:
                stores[name][0] = "OK"
            return 200, {"success": True}
        # One byte of each store moves whenever somebody asks.
        for name in job["of"]:
            target = next((other for other, (state, _used) in stores.items() if state == "OK"), None)
            if stores[name][1] and target:
                stores[name][1] -= 1
                stores[target][1] += 1
                job["migrated_bytes"] += 1
            stores[name][0] = "DRAINING" if stores[name][1] else "DRAINED"
        job["status_name"] = "RUNNING" if any(stores[name][1] for name in job["of"]) else "SUCCEEDED"
        return 200, {key: value for key, value in job.items() if key != "of"}


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> t.Iterator[t.Any]:
    monkeypatch.setattr(_mooncake_admin, "_POLL_SECONDS", 0.05)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stores)
    server.stores, server.jobs, server.asked, server.busy = {}, {}, [], 0  # type: ignore[attr-defined]
    server.lock = threading.Lock()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def drains(server: t.Any, *hosts: list[str], seconds: float = 10) -> list[t.Any]:
    """What becomes of drains of several hosts at the same time: bytes, or what they say."""

    def one(names: list[str]) -> t.Any:
        try:
            return Admin(pool(server)).drain(names, seconds)
        except HostError as error:
            return str(error)

    with ThreadPoolExecutor(len(hosts)) as threads:
        return list(threads.map(one, hosts))


def test_a_drain_waits_until_all_is_moved(stores: t.Any) -> None:
    stores.stores = {"a1": ["OK", 3], "a2": ["OK", 0], "b1": ["OK", 1]}
    assert drains(stores, ["a1", "a2"]) == [3]
    assert stores.stores == {"a1": ["DRAINED", 0], "a2": ["DRAINED", 0], "b1": ["OK", 4]}
    assert drains(stores, ["a1", "a2"]) == [0], "there is nothing left to do"


@pytest.mark.parametrize("_again", range(3))
def test_hosts_that_drain_at_once_take_turns_and_nothing_is_lost(stores: t.Any, _again: int) -> None:
    stores.stores = {"a": ["OK", 2], "b": ["OK", 3], "c": ["OK", 4]}
    found = drains(stores, ["a"], ["b"], ["c"], seconds=5)  # a busy machine needs some of them
    # The last one finds nobody who takes its data, and keeps them.
    (left,) = [name for name, (state, _used) in stores.stores.items() if state == "OK"]
    assert sorted(isinstance(one, str) for one in found) == [False, False, True]
    assert f"the drain of {left} was given up: no other store takes their data" in found
    assert sum(used for _state, used in stores.stores.values()) == stores.stores[left][1] == 9


def test_one_that_waits_for_its_turn_goes_on_when_the_other_is_back(stores: t.Any) -> None:
    stores.stores = {"a": ["DRAINED", 0], "b": ["OK", 3]}
    back = threading.Timer(0.3, lambda: stores.stores.update(a=["OK", 0]))  # it has become smaller, and serves again
    back.start()
    assert drains(stores, ["b"]) == [3]
    assert stores.stores == {"a": ["OK", 3], "b": ["DRAINED", 0]}


def test_a_drain_that_an_earlier_run_began_is_waited_for(stores: t.Any) -> None:
    stores.stores = {"a": ["DRAINING", 3], "b": ["OK", 0]}
    done = threading.Timer(0.3, lambda: stores.stores.update(a=["DRAINED", 0]))
    done.start()
    assert drains(stores, ["a"]) == [0]
    assert "/api/v1/drain_jobs" not in stores.asked


def test_a_drain_that_does_not_end_is_cancelled(stores: t.Any) -> None:
    stores.stores, stores.busy = {"a": ["OK", 10**6], "b": ["OK", 0]}, 3  # an object is on its way when it is cancelled
    assert drains(stores, ["a"], seconds=0.1) == ["the drain of a was given up: not done within 0.1 seconds"]
    assert stores.stores["a"][0] == "OK" and sum(used for _state, used in stores.stores.values()) == 10**6


def test_a_drain_that_fails_is_an_error(master: t.Any) -> None:
    master.answers["/get_segments_detail"] = {"segments": [{**SEGMENT, "segment_name": name} for name in ("s", "z")]}
    master.answers["/api/v1/drain_jobs"] = {"success": True, "job_id": "1-2"}
    master.answers["/api/v1/drain_jobs/query"] = {**JOB, "status_name": "FAILED", "message": "units remain"}
    with pytest.raises(HostError, match="ended as FAILED: units remain"):
        Admin(pool(master)).drain(["s"], 10)
    assert ("POST", "/api/v1/drain_jobs", '{"segments": ["s"]}') in master.asked


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
