#!/usr/bin/python3
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs on the host: wait until each guest answers on a vsock port. Arguments: SECONDS PORT CID...

Port 1024 is the agent, which is asked as the module microvm does; port 1025 is the reader, whose answer is printed.
"""

import socket
import sys
import time

seconds, port, *cids = (int(word) for word in sys.argv[1:])
end = time.monotonic() + seconds
while cids:
    for cid in list(cids):
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as connection:
            connection.settimeout(5)
            try:
                connection.connect((cid, port))
                if port == 1024:
                    connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                answer = b""
                while chunk := connection.recv(65536):
                    answer += chunk
            except OSError:
                continue
        if answer:
            cids.remove(cid)
            if port != 1024:
                print(int(answer))
    if time.monotonic() > end:
        sys.exit(f"no answer on port {port} within {seconds} seconds from {cids}")
    time.sleep(0.2)
