#!/usr/bin/python3
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs on the host: its memory by kind, as JSON, once the guests have been at rest for as many seconds as the argument says."""

import json
import sys
import time

time.sleep(float(sys.argv[1]))
have = {}
with open("/proc/meminfo", encoding="ascii") as file:
    for line in file:
        words = line.split()
        have[words[0].rstrip(":")] = int(words[1]) * 1024
kinds = {
    "RAM and VMM": have["AnonPages"] + have["Shmem"],
    "page cache": have["Cached"] + have["Buffers"] - have["Shmem"],
    "page tables": have["PageTables"] + have.get("SecPageTables", 0),
    "kernel": have["Slab"] + have["KernelStack"] + have.get("Percpu", 0),
}
print(json.dumps({**kinds, "used": have["MemTotal"] - have["MemFree"]}))
