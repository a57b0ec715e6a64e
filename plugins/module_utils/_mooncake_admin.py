# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the Mooncake master is asked over HTTP: what its stores hold, to drain them, and its tenants' quotas."""

from __future__ import annotations

import http.client
import json
import time
import typing as t
import urllib.parse
from contextlib import closing

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

_UNFINISHED = ("CREATED", "PLANNING", "PENDING", "RUNNING")
_TIMEOUT_SECONDS = 10
_DRAIN = "/api/v1/drain_jobs"
_POLL_SECONDS = 0.5


def master_address(pool: t.Mapping[str, t.Any]) -> str:
    """Where clients find the master: its address, or etcd where several masters stand by."""
    if pool["etcd"]:
        return "etcd://" + ";".join(pool["etcd"])
    return f"{pool['master']['address']}:{pool['master']['port']}"


class Admin:
    """The leading master of a pool.

    :param pool: the pool's declaration
    :raises HostError: none answers, or none leads
    """

    def __init__(self, pool: t.Mapping[str, t.Any]) -> None:
        master = pool["master"]
        self.address, self.port = str(master["metrics_address"]), int(master["metrics_port"])
        if not pool["etcd"]:
            return
        # Each master of a highly available pool knows who leads, and only that one answers for the pool.
        leader = self.get("/leader").get("leader_address")
        if not leader:
            raise HostError(f"no master of pool {pool['name']} leads. Are most of the etcd members up?")
        self.address = str(leader).rpartition(":")[0]
        if self.address == master["address"]:
            self.address = str(master["metrics_address"])

    def _ask(self, method: str, path: str, body: t.Any = None) -> tuple[int, str]:
        try:
            with closing(http.client.HTTPConnection(self.address, self.port, timeout=_TIMEOUT_SECONDS)) as connection:
                headers = {"Content-Type": "application/json"}
                connection.request(method, path, None if body is None else json.dumps(body), headers)
                response = connection.getresponse()
                return response.status, response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise HostError(f"the master at {self.address}:{self.port} does not answer: {error}") from error

    def get(self, path: str) -> dict[str, t.Any]:
        """A JSON answer."""
        return self._json("GET", path)

    def _json(self, method: str, path: str, body: t.Any = None) -> dict[str, t.Any]:
        status, text = self._ask(method, path, body)
        try:
            answer = json.loads(text)
        except ValueError as error:
            raise HostError(f"{self.address}:{self.port}{path} is no Mooncake master: {text[:80]!r}") from error
        if status != 200 or not isinstance(answer, dict) or answer.get("success", True) is not True:
            raise HostError(f"the master answered {status} to {method} {path.partition('?')[0]}: {text[:300]}")
        return answer

    # -- stores -----------------------------------------------------------------

    def segments(self) -> dict[str, dict[str, t.Any]]:
        """Store's name in the engine -> ``used_bytes``, ``capacity_bytes`` and ``status``."""
        found: dict[str, dict[str, t.Any]] = {}
        for segment in self.get("/get_segments_detail")["segments"]:
            # A store that has grown has several segments of one name, and one account for them.
            found[segment["segment_name"]] = {
                "used_bytes": int(segment.get("allocator_used_bytes", 0)),
                "capacity_bytes": int(segment.get("allocator_capacity_bytes", segment["size_bytes"])),
                "status": segment["status"],
            }
        return found

    def objects(self) -> int:
        """How many objects the master knows."""
        for line in self._ask("GET", "/metrics")[1].splitlines():
            if line.startswith("master_key_count "):
                return int(line.split()[1])
        raise HostError(f"{self.address}:{self.port}/metrics has no master_key_count. Is another program there?")

    def drain(self, names: t.Sequence[str], timeout_seconds: float) -> int:
        """Move everything off these stores to the pool's others; returns the bytes that were moved.

        Other hosts may drain at the same time, and a store that is being drained takes nothing: two would wait for each
        other for ever. So they take turns, the one whose name comes first before the others, which serve on meanwhile.
        What an earlier run began and did not wait for is waited for.

        :raises HostError: nothing takes the data, or not in time; what is left stays where it is
        """
        end, moved, job = time.monotonic() + timeout_seconds, 0, ""
        while True:
            state = self.get(f"{_DRAIN}/query?{urllib.parse.urlencode({'job_id': job})}") if job else {}
            if job and state["status_name"] not in _UNFINISHED:
                if state["status_name"] != "SUCCEEDED":
                    raise HostError(f"the drain ended as {state['status_name']}: {state['message']}")
                return moved + int(state["migrated_bytes"])
            status = {name: store["status"] for name, store in self.segments().items()}
            left = [status[name] for name in names if status.get(name, "DRAINED") != "DRAINED"]
            if not left and not job:
                return moved
            others = {name: is_now for name, is_now in status.items() if name not in names}
            taken = "OK" in others.values()
            turn = all(min(names) < name for name, is_now in others.items() if is_now == "DRAINING")
            if job and not taken and not turn and self._cancelled(job):
                moved, job = moved + int(state["migrated_bytes"]), ""
            elif not job and taken and turn and set(left) == {"OK"}:
                job = self._json("POST", _DRAIN, {"segments": [n for n in names if status.get(n) == "OK"]})["job_id"]
            if time.monotonic() > end:
                ended = "was given up" if not job or self._cancelled(job, 10) else "goes on in the master"
                why = f"not done within {timeout_seconds:g} seconds" if taken else "no other store takes their data"
                raise HostError(f"the drain of {', '.join(names)} {ended}: {why}")
            time.sleep(_POLL_SECONDS)

    def _cancelled(self, job: str, patience_seconds: float = 0) -> bool:
        """Take a drain back, so that its stores serve again; the master refuses while an object is on its way."""
        end = time.monotonic() + patience_seconds
        while True:
            query = urllib.parse.urlencode({"job_id": job})  # in the path: the body is not read
            if self._ask("POST", f"{_DRAIN}/cancel?{query}")[0] == 200:
                return True
            if time.monotonic() > end:
                return False
            time.sleep(_POLL_SECONDS)

    # -- tenants ----------------------------------------------------------------

    def quotas(self) -> dict[str, dict[str, int]]:
        """Tenant's name in the engine -> ``quota_bytes`` and ``used_bytes``."""
        return {
            tenant["tenant_id"]: {
                "quota_bytes": tenant["requested_quota_bytes"],
                "used_bytes": tenant["charged_bytes"],
            }
            for tenant in t.cast("list[dict[str, t.Any]]", self.get("/api/v1/tenant_quotas")["data"])
            if tenant["has_explicit_policy"]
        }

    def set_quota(self, tenant: str, quota_bytes: int) -> None:
        """Register a tenant, or change its quota."""
        self._json("PUT", self._quota(tenant), {"requested_quota_bytes": quota_bytes})

    def remove_quota(self, tenant: str) -> None:
        """Take a tenant out; it must hold nothing."""
        self._json("DELETE", self._quota(tenant))

    @staticmethod
    def _quota(tenant: str) -> str:
        return "/api/v1/tenant_quotas?" + urllib.parse.urlencode({"tenant_id": tenant})
