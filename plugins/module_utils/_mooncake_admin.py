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
        """Move everything off these stores; returns the bytes that were moved."""
        job = self._json("POST", "/api/v1/drain_jobs", {"segments": list(names)})["job_id"]
        end = time.monotonic() + timeout_seconds
        query = "/api/v1/drain_jobs/query?" + urllib.parse.urlencode({"job_id": job})
        while True:
            state = self.get(query)
            if state["status_name"] == "SUCCEEDED":
                return int(state["migrated_bytes"])
            if state["status_name"] not in _UNFINISHED:
                raise HostError(f"the drain ended as {state['status_name']}: {state['message']}")
            if time.monotonic() > end:
                self._json("POST", "/api/v1/drain_jobs/cancel", {"job_id": job})
                raise HostError(f"the drain was not done within {timeout_seconds:g} seconds and was cancelled")
            time.sleep(0.5)

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
