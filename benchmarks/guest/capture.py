#!/usr/bin/python3
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs on the host: write /run/bench/start.sh, a shell loop that starts the very processes of the microVMs that run now.

Arguments: further words for each QEMU. Only what systemd gave to each (its sockets, its configuration disk) is elsewhere.
"""

import glob
import os
import shlex
import shutil
import sys

lines = ["#!/bin/sh", "cd /"]
for path in sorted(glob.glob("/proc/[0-9]*/cmdline")):
    with open(path, encoding="utf-8") as file:
        argv = file.read().rstrip("\0").split("\0")
    if not os.path.basename(argv[0]).startswith("qemu-system") or "-name" not in argv:
        continue
    name = argv[argv.index("-name") + 1].partition(",")[0]
    own = f"/run/bench/{name}"
    os.makedirs(own, exist_ok=True)
    credentials = f"/run/credentials/agentfleet-microvm@{name}.service"
    for file in glob.glob(f"{credentials}/*"):
        shutil.copy(file, own)
    argv = [word.replace(credentials, own).replace(f"/run/agentfleet/{name}/", f"{own}/") for word in argv]
    lines.append(f"setsid {shlex.join(argv + sys.argv[1:])} </dev/null >{own}/log 2>&1 & echo $! >>/run/bench/pids")
with open("/run/bench/start.sh", "w", encoding="utf-8") as script:
    script.write("\n".join(lines) + "\n")
