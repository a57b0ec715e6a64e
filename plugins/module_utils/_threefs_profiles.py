# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tuning of 3FS as data: profile -> file -> dotted key -> value.

``**`` takes a key wherever it stands, since the same socket options appear in each
listener and each client of a file. The numbers of ``large_io``, ``small_io`` and
``client`` are those with which Alibaba Cloud runs 3FS for KV caches, as its public
operator ships them; they are a start for measurements, not a promise.
"""

from __future__ import annotations

import typing as t

Profile = dict[str, dict[str, t.Any]]

PROFILES: dict[str, Profile] = {
    # More queue pairs and bigger buffers, so that one stream of big blocks fills the network cards evenly.
    "large_io": {
        "storage_main": {
            "**.connect_concurrency_limiter.max_concurrency": 16,
            "**.ibsocket.buf_size": 163840,
            "**.ibsocket.max_rdma_wr": 2048,
            "**.ibsocket.max_rdma_wr_per_post": 64,
            "**.transport_pool.max_connections": 16,
            "server.reliable_forwarding.retry_first_wait": "500ms",
        },
    },
    # More listeners, workers and depth, so that many small reads do not wait for each other.
    "small_io": {
        "storage_main": {
            "server.base.groups[RDMA].io_worker.num_event_loop": 8,
            "server.base.thread_pool.num_io_threads": 64,
            "server.base.thread_pool.num_proc_threads": 64,
            "server.base.thread_pool.num_connect_threads": 8,
            "server.aio_read_worker.num_threads": 128,
            "server.aio_read_worker.queue_size": 8192,
            "server.aio_read_worker.max_events": 1024,
            "server.coroutines_pool_read.threads_num": 16,
            "server.coroutines_pool_read.coroutines_num": 128,
            "server.base.groups[RDMA].processor.max_processing_requests_num": 8192,
            "server.storage.max_concurrent_rdma_reads": 512,
        },
    },
    # FUSE and USRBIO: the side of the inference engine.
    "client": {
        "hf3fs_fuse_main": {
            "io_jobq_size": 2048,
            "max_jobs_per_ioring": 64,
            "max_idle_threads": 10,
            "storage.net_client.io_worker.transport_pool.max_connections": 64,
            "storage.net_client.io_worker.ibsocket.max_rdma_wr_per_post": 128,
            "storage.net_client.thread_pool.num_bg_threads": 8,
            "storage.net_client.thread_pool.num_connect_threads": 16,
            "storage.net_client.thread_pool.num_io_threads": 16,
            "storage.net_client.thread_pool.num_proc_threads": 16,
            "**.max_batch_bytes": "8MB",
            "**.max_concurrent_requests": 128,
            "**.max_concurrent_requests_per_server": 128,
        },
    },
    # Programs that read through USRBIO rings instead of the mount: more workers, some of them for rings of high and of low
    # priority, and longer queues before them. The buffers are the programs' own, in /dev/shm, and no key of this file.
    "usrbio": {
        "hf3fs_fuse_main": {
            "batch_io_coros": 256,
            "io_worker_coros.hi": 32,
            "io_worker_coros.lo": 32,
            "io_jobq_size": 4096,
            "io_jobq_sizes.hi": 256,
            "max_jobs_per_ioring": 64,
        },
    },
    # Elastic RDMA in clouds takes one scatter-gather entry.
    "erdma": {
        "storage_main": {"**.ibsocket.max_sge": 1},
        "meta_main": {"**.ibsocket.max_sge": 1},
        "mgmtd_main": {"**.ibsocket.max_sge": 1},
        "hf3fs_fuse_main": {"**.ibsocket.max_sge": 1},
    },
    # 384 MiB of pinned buffers instead of 8 GiB for each storage service: for tests.
    "small_memory": {
        "storage_main": {
            "server.buffer_pool.rdmabuf_count": 32,
            "server.buffer_pool.big_rdmabuf_count": 16,
            "server.buffer_pool.big_rdmabuf_size": "16MB",
        },
    },
}
