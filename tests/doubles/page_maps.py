# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""DOUBLE of the metadata services of SGLang 0.5.23 and vLLM 0.33.0 for 3FS: which key lies on which page of a rank's file.

Imitated with their traps:

- A rank is made by the engine's first ``initialize``; a later one with other pages is ignored. Before it SGLang answers
  404, vLLM 500.
- SGLang hands pages out from the end, and when all are taken the least recently used one.
- vLLM hands them out from the beginning, and -1 when all are taken: it has no request that forgets a key. A key is found
  when as many ranks confirmed it as there were when it came.
"""

from __future__ import annotations

import abc
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Refusal(Exception):
    """An HTTP error: code, detail."""


class Service(abc.ABC):
    """A service on a free port of this host."""

    def __init__(self) -> None:
        self.pages: dict[int, int] = {}
        self.free: dict[int, list[int]] = {}
        self.lock = threading.Lock()
        self.asked: list[str] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.asked.append(self.path)
                try:
                    with service.lock:
                        code, answer = 200, service.answer(self.path.strip("/").split("/"), content)
                except Refusal as refusal:
                    code, answer = refusal.args[0], {"detail": refusal.args[1]}
                data = json.dumps(answer).encode() if answer is not None else b""
                self.send_response(code if data else 204)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_arguments: object) -> None:
                """Nothing is logged."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def initialize(self, rank: int, pages: int) -> None:
        """What an engine that begins does."""
        if rank not in self.pages:
            self.pages[rank], self.free[rank] = pages, list(range(pages))

    def release(self, rank: int, pages: list[int]) -> None:
        self.free[rank] += [page for page in pages if page not in self.free[rank]]

    @abc.abstractmethod
    def answer(self, path: list[str], content: dict) -> dict | None:
        """What the service says to a request."""


class Sglang(Service):
    """``sglang.srt.mem_cache.storage.hf3fs.mini_3fs_metadata_server``."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: dict[int, dict[str, int]] = {}

    def answer(self, path: list[str], content: dict) -> dict | None:
        rank, verb = int(path[0]), path[1]
        if verb == "initialize":
            self.initialize(rank, content["num_pages"])
            return None
        if rank not in self.pages:
            raise Refusal(404, f"Rank {rank} namespace 'kv' not initialized. Please call /{rank}/initialize first.")
        keys = self.keys.setdefault(rank, {})
        if verb == "reserve_and_allocate_page_indices":
            found = []
            for key, _prefix in content["keys"]:
                if key in keys:
                    found.append([True, keys[key]])
                    keys[key] = keys.pop(key)
                else:
                    page = self.free[rank].pop() if self.free[rank] else keys.pop(next(iter(keys)))
                    found.append([False, page])
            return {"indices": found}
        if verb == "get_page_indices":
            for key in content["keys"]:
                if key in keys:
                    keys[key] = keys.pop(key)
            return {"indices": [keys.get(key) for key in content["keys"]]}
        if verb == "confirm_write":
            for key, page in content["written_keys_to_confirm"]:
                keys.pop(key, None)
                keys[key] = page
            self.release(rank, content["pages_to_release"])
            return None
        if verb == "delete_keys":
            self.release(rank, [keys.pop(key) for key in content["keys"] if key in keys])
            return None
        raise Refusal(404, "Not Found")


class Vllm(Service):
    """``vllm.distributed.kv_transfer.kv_connector.v1.hf3fs.hf3fs_metadata_server``."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: dict[str, tuple[int, dict[int, int]]] = {}

    def complete(self, key: str) -> bool:
        return key in self.keys and len(self.keys[key][1]) == self.keys[key][0]

    def answer(self, path: list[str], content: dict) -> dict | None:
        if path[0] == "rank":
            self.initialize(int(path[1]), content["num_pages"])
            return {"message": "initialized"}
        rank, verb = content["rank"], path[1]
        if verb == "confirm_write":
            for key, page in content["confirmations"]:
                self.keys.setdefault(key, (len(self.pages), {}))[1][rank] = page
            if content["pages_to_release"] and rank not in self.pages:
                raise Refusal(500, f"Confirmation failed: {rank}")
            if content["pages_to_release"]:
                self.release(rank, content["pages_to_release"])
            return None
        if rank not in self.pages:
            raise Refusal(500, f"Failed to get key locations: Rank {rank} not initialized")
        if verb == "batch_allocate":
            count = len(content["keys"])
            given = self.free[rank][:count] if len(self.free[rank]) >= count else []
            self.free[rank] = self.free[rank][len(given) :]
            found = {}
            for index, (key, _prefix) in enumerate(content["keys"]):
                if self.complete(key) and rank in self.keys[key][1]:
                    self.release(rank, given[index : index + 1])
                    found[key] = self.keys[key][1][rank]
                else:
                    found[key] = given[index] if index < len(given) else -1
            return {"rank": rank, "results": [list(item) for item in found.items()]}
        if verb == "get_locations":
            pages = [self.keys[key][1].get(rank) if self.complete(key) else None for key in content["keys"]]
            return {"locations": pages}
        raise Refusal(404, "Not Found")
