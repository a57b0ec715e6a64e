# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A client of Cloud Hypervisor's HTTP API on its UNIX socket.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

import http.client
import json
import socket
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._cloud_hypervisor_config import (
    QUESTIONS,
    REQUESTS,
    Schema,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError
from ansible_collections.agentfleet.metal.plugins.module_utils._vmm import Connection

PENDING = 429
BODY_LIMIT = 51200  # of the server, which answers a longer one with a closed connection


class Pending(HostError):
    """The guest has not yet let go what it was asked for before."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_seconds: float) -> None:
        super().__init__("localhost", timeout=timeout_seconds)
        self._path, self._timeout_seconds = path, timeout_seconds

    def connect(self) -> None:
        self.sock = Connection()
        self.sock.begin(self._timeout_seconds)
        self.sock.connect(self._path)


class Api:
    """One process's API.

    :param path: real path of its socket
    :param timeout_seconds: for each request; its one API thread answers them one after the other
    """

    def __init__(self, path: str, timeout_seconds: float = 30) -> None:
        self._path, self._timeout_seconds = path, timeout_seconds

    def get(self, question: str) -> dict[str, t.Any]:
        """Ask one of ``QUESTIONS``."""
        if question not in QUESTIONS:
            raise KeyError(question)
        return self._exchange("GET", question, None, self._timeout_seconds)

    def put(self, request: str, sent: Schema | None = None, timeout_seconds: float = 0) -> dict[str, t.Any]:
        """Send one of ``REQUESTS`` with the object that it takes.

        :param timeout_seconds: another limit than the usual one
        """
        if (type(sent) if sent else None) is not REQUESTS[request]:
            raise TypeError(f"{request} takes {REQUESTS[request]}, not {sent}")
        return self._exchange("PUT", request, sent, timeout_seconds or self._timeout_seconds)

    def _exchange(self, method: str, path: str, sent: Schema | None, timeout_seconds: float) -> dict[str, t.Any]:
        body = json.dumps(sent.body(), separators=(",", ":")) if sent else None
        if body and len(body) > BODY_LIMIT:
            raise HostError(f"{path}: {len(body)} bytes are more than the {BODY_LIMIT} that Cloud Hypervisor reads")
        connection = _UnixConnection(self._path, timeout_seconds)
        try:
            connection.request(method, f"/api/v1/{path}", body, {"Content-Type": "application/json"} if body else {})
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        except socket.timeout as error:
            raise HostError(f"Cloud Hypervisor did not answer {path} within {timeout_seconds:g} seconds") from error
        except (OSError, http.client.HTTPException) as error:
            raise HostError(f"Cloud Hypervisor did not answer {path}: {str(error) or type(error).__name__}") from error
        finally:
            connection.close()
        if not 200 <= answer.status < 300:
            kind = Pending if answer.status == PENDING else HostError
            raise kind(f"Cloud Hypervisor refused {path} ({answer.status}): {_told(text)}")
        try:
            told = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError) as error:
            raise HostError(f"Cloud Hypervisor answered {path} with no JSON: {text[:200]}") from error
        return told if isinstance(told, dict) else {}


def _told(text: str) -> str:
    """An error's text: a list of causes, or whatever it is."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        told = text
    return ": ".join(map(str, told)) if isinstance(told, list) else str(told).strip() or "it does not say why"
