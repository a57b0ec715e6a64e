#!/usr/bin/python3
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs on the host: seconds from the start of a microVM's unit to the agent's answer. Arguments: ROUNDS NAME=CID...

In turns, one at a time; each is stopped before the next. Prints a JSON of name to seconds.
"""

import json
import socket
import subprocess
import sys
import time

rounds, *names = sys.argv[1:]
found = {name.partition("=")[0]: [] for name in names}
for _round in range(int(rounds)):
    for word in names:
        name, _equals, cid = word.partition("=")
        unit = f"agentfleet-microvm@{name}.service"
        begin = time.monotonic()
        subprocess.run(["systemctl", "start", unit], check=True, timeout=300)
        while True:
            with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as connection:
                connection.settimeout(5)
                try:
                    connection.connect((int(cid), 1024))
                    connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    if connection.recv(4096):
                        break
                except OSError:
                    pass
            if time.monotonic() - begin > 600:
                sys.exit(f"{name}: no answer within 600 seconds")
            time.sleep(0.05)
        found[name].append(time.monotonic() - begin)
        subprocess.run(["systemctl", "stop", unit], check=True, timeout=300)
print(json.dumps(found))
