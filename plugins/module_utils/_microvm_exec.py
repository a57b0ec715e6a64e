# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""microvm-exec [--user USER] [--timeout SECONDS] NAME COMMAND...: run a command in a microVM of this host, over vsock.

The host's end of the connection plugin agentfleet.metal.vsock, and a tool for administrators. Standard input, both
outputs and the exit code are the command's; 255 says that the microVM was not reached. Only root may: the server in the
microVM answers source ports below 1024 only.

A program that is copied to the host as it is, so it imports nothing of the collection.
"""

from __future__ import annotations

import errno
import json
import os
import random
import select
import socket
import struct
import sys
import threading
import time
import typing as t

HOME = "/var/lib/agentfleet/microvms"
RUN = "/run/agentfleet"
PORT, RESERVED_PORTS = 1023, 1024
REQUEST, STDIN, STDOUT, STDERR, EXIT = range(5)
HEADER = struct.Struct("!BI")
CHUNK = 65536  # no frame has more
ANSWER_BYTES = 1 << 20  # a guest may send what it likes, and the host keeps no more of it
NOT_REACHED = 255
# A command's own 255, told from NOT_REACHED: exit code 254 and this as the last line of standard error.
REAL_255 = b"microvm-exec: exit code 255\n"


class Unreachable(Exception):
    """The microVM does not answer; the message says what to look at."""


def send(connection: socket.socket, kind: int, content: bytes) -> None:
    """One frame: kind, length, content."""
    connection.sendall(HEADER.pack(kind, len(content)) + content)


def receive(connection: socket.socket) -> tuple[int, bytes]:
    """The next frame."""

    def exactly(size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                chunk = connection.recv(size - len(data))
            except ConnectionResetError:  # a guest whose machine was reset, which has closed nothing
                chunk = b""
            if not chunk:
                raise ConnectionResetError("the microVM went away before the command had ended")
            data += chunk
        return data

    kind, size = HEADER.unpack(exactly(HEADER.size))
    if kind not in (STDOUT, STDERR, EXIT) or size > CHUNK:
        raise ConnectionError(f"the microVM sends what its server does not: frame {kind} of {size} bytes")
    return kind, exactly(size)


def exchange(connection: socket.socket, message: bytes, timeout_seconds: float, line: bool = False) -> bytes:
    """Send a message and return the whole answer, up to the other side's end or the first newline.

    :param timeout_seconds: for all of it, so that nobody is held by an answer that comes byte by byte
    :param line: read no further than the newline; what follows is not part of the answer
    :raises OSError: it took longer, or the answer is longer than ANSWER_BYTES
    """
    end, answer = time.monotonic() + timeout_seconds, bytearray()
    connection.settimeout(timeout_seconds)
    connection.sendall(message)
    while not (line and answer.endswith(b"\n")):
        left = end - time.monotonic()
        if left <= 0:
            raise socket.timeout(f"no whole answer within {timeout_seconds:g} s")
        connection.settimeout(left)
        chunk = connection.recv(1 if line else CHUNK)
        if not chunk:
            break
        answer += chunk
        if len(answer) > ANSWER_BYTES:
            raise ConnectionError(f"an answer of more than {ANSWER_BYTES} bytes")
    connection.settimeout(timeout_seconds)
    return bytes(answer)


def cid_of(name: str) -> int:
    """The cid that a microVM runs with. With the one that it is declared with, another one may run."""
    path = f"{RUN}/{name}.spec.json"
    try:
        with open(path, encoding="utf-8") as file:
            return int(json.load(file)["cid"])
    except FileNotFoundError:
        if not os.path.exists(f"{HOME}/{name}/spec.json"):
            raise Unreachable(f"{name}: this host has no microVM of this name") from None
        raise  # it may be about to start
    except (ValueError, KeyError) as error:  # it is being written: look again
        raise OSError(f"{path} cannot be read: {error}") from None


def connect(name: str, timeout_seconds: float) -> socket.socket:
    """A connection to the server in a microVM, which may still be booting."""
    end = time.monotonic() + timeout_seconds
    while True:
        try:
            unix = f"{RUN}/{name}/vsock"
            return _unix(unix) if os.path.exists(unix) else _vsock(cid_of(name))
        except PermissionError:
            raise Unreachable(f"{name}: only root may run commands in microVMs") from None
        except OSError as error:
            if time.monotonic() >= end:
                raise Unreachable(
                    f"{name}: no answer on vsock port {PORT} within {timeout_seconds:g} s ({error}). Is it running and "
                    "booted (microvm_info)? Its image must have the agent, without agentfleet_exec=off"
                ) from None
        time.sleep(0.2)


def bind_reserved(connection: socket.socket) -> None:
    """Give a vsock connection a source port that only root can use, by which a guest knows the host's root."""
    for port in random.sample(range(1, RESERVED_PORTS), 64):
        try:
            return connection.bind((socket.VMADDR_CID_ANY, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, "no source port below 1024 is free")


def _vsock(cid: int) -> socket.socket:
    """Through the host's kernel, from a port that only root can use."""
    connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        bind_reserved(connection)
        connection.settimeout(5)
        connection.connect((cid, PORT))
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection


def _unix(path: str) -> socket.socket:
    """Through the socket of Cloud Hypervisor."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(5)
        connection.connect(path)
        answer = exchange(connection, f"CONNECT {PORT}\n".encode(), 5, line=True)
        if not (answer.startswith(b"OK ") and answer.endswith(b"\n")):
            raise ConnectionRefusedError(answer.decode(errors="replace").strip() or "nobody listens")
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection


def run(connection: socket.socket, command: str, user: str, files: t.Sequence[int] = (0, 1, 2)) -> int:
    """Run a command to its end; the exit code.

    :param files: descriptors of standard input and of both outputs
    """
    stdin, stdout, stderr = files
    send(connection, REQUEST, json.dumps({"command": command, "user": user}).encode())
    threading.Thread(target=_feed, args=(connection, stdin), daemon=True).start()
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    poll.register(stdout, 0)  # tells only that nobody reads any more, as when ssh was ended
    while True:
        for descriptor, _event in poll.poll():
            if descriptor == stdout:
                raise BrokenPipeError("nobody reads the output")
        kind, content = receive(connection)
        if kind == EXIT:
            return int(content)
        output = {STDOUT: stdout, STDERR: stderr}[kind]
        while content:
            content = content[os.write(output, content) :]


def _feed(connection: socket.socket, stdin: int) -> None:
    try:
        while chunk := os.read(stdin, CHUNK):
            send(connection, STDIN, chunk)
        send(connection, STDIN, b"")
    except OSError:
        pass  # the command has ended


def main(arguments: t.Sequence[str] | None = None) -> int:
    """The program."""
    import argparse  # others use what is above

    parser = argparse.ArgumentParser(prog="microvm-exec", description="Run a command in a microVM of this host.")
    parser.add_argument("--user", default="root", help="user of the microVM")
    parser.add_argument("--timeout", type=float, default=10, metavar="SECONDS", help="how long to wait for the microVM")
    parser.add_argument("name", help="name of the microVM")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="words, joined by spaces, for the microVM's shell")
    options = parser.parse_args(arguments)
    if not options.command:
        parser.error("no command")
    try:
        with connect(options.name, options.timeout) as connection:
            code = run(connection, " ".join(options.command), options.user)
    except (Unreachable, OSError, ValueError) as error:  # the last is of an exit code that is no number
        sys.stderr.write(f"microvm-exec: {error}\n")
        return NOT_REACHED
    if code == NOT_REACHED:
        sys.stderr.write(REAL_255.decode())
    return 254 if code == NOT_REACHED else code


if __name__ == "__main__":
    # Not sys.exit, which would wait for the thread that reads standard input.
    _code = main()
    sys.stderr.flush()
    os._exit(_code)
