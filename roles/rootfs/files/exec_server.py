# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs commands in this microVM for its host: the guest's end of the connection agentfleet.metal.vsock.

It listens on vsock port 1023. Only the host is answered, and there only root: others cannot use a source port below
1024, and Cloud Hypervisor's socket has an owner. ``agentfleet_exec=off`` on the kernel's command line switches it off.

Both ends send frames: kind (a byte), length (four bytes, network order), content. First comes the REQUEST, JSON with
``command`` for the shell and ``user``; then STDIN until an empty one; back come STDOUT, STDERR, and EXIT with the exit
code in text. When the host hangs up before EXIT, the command is ended.
"""

import json
import os
import pwd
import select
import signal
import socket
import struct
import threading

PORT, HOST_CID, RESERVED_PORTS = 1023, 2, 1024
REQUEST, STDIN, STDOUT, STDERR, EXIT = range(5)
HEADER = struct.Struct("!BI")
CHUNK = 65536
SESSIONS = threading.BoundedSemaphore(64)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SECONDS_TO_END = 5


def send(connection, kind, content=b""):
    connection.sendall(HEADER.pack(kind, len(content)) + content)


def receive(connection):
    """The next frame; EOFError when the other end has hung up."""

    def exactly(size):
        data = b""
        while len(data) < size:
            chunk = connection.recv(size - len(data))
            if not chunk:
                raise EOFError
            data += chunk
        return data

    kind, size = HEADER.unpack(exactly(HEADER.size))
    return kind, exactly(size)


def start(command, name):
    """The command in a shell of its own session, as a user of this microVM."""
    import subprocess

    user = pwd.getpwnam(name)
    environment = {
        **os.environ, "PATH": PATH, "HOME": user.pw_dir, "USER": name, "LOGNAME": name, "SHELL": user.pw_shell,
        "LANG": "C.UTF-8",
    }  # fmt: skip
    other = {} if user.pw_uid == os.getuid() else {
        "user": user.pw_uid, "group": user.pw_gid, "extra_groups": os.getgrouplist(name, user.pw_gid),
    }  # fmt: skip
    return subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, start_new_session=True,
        cwd=user.pw_dir if os.path.isdir(user.pw_dir) else "/", env=environment, **other,
    )  # fmt: skip


def feed(connection, stdin):
    """Standard input, until the host says that it ends or hangs up."""
    try:
        while content := receive(connection)[1]:
            while content:
                content = content[stdin.write(content) :]
    except (EOFError, OSError):
        pass  # nobody writes, or nobody reads
    stdin.close()


def follow(connection, process):
    """Both outputs until the command itself has ended, whatever it left running, and then its exit code."""
    streams = {process.stdout.fileno(): STDOUT, process.stderr.fileno(): STDERR}
    ended = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(connection, select.POLLRDHUP)
        for number in (*streams, ended):
            poll.register(number, select.POLLIN)
        running = True
        while running:
            for number, _event in poll.poll():
                if number == ended:
                    running = False
                elif number not in streams:
                    raise ConnectionResetError("the host hung up")
                elif data := os.read(number, CHUNK):
                    send(connection, streams[number], data)
                else:
                    poll.unregister(number)
        for number, kind in streams.items():
            os.set_blocking(number, False)
            try:
                while data := os.read(number, CHUNK):
                    send(connection, kind, data)
            except BlockingIOError:
                pass  # empty, and held open by something in the background
        code = process.wait()
        send(connection, EXIT, str(code if code >= 0 else 128 - code).encode())
    finally:
        if process.returncode is None:
            end(process, ended)
        os.close(ended)


def end(process, ended):
    """End a command with all that it started in its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, number)
        if select.select([ended], [], [], SECONDS_TO_END)[0]:
            break
    process.wait()


def session(connection):
    """One request."""
    import subprocess  # takes time and a megabyte that a microVM does not need until then

    kind, content = receive(connection)
    request = json.loads(content)
    try:
        if kind != REQUEST:
            raise ValueError(f"a request is expected, and not a frame of kind {kind}")
        process = start(request["command"], request.get("user") or "root")
    except (KeyError, OSError, ValueError, subprocess.SubprocessError) as error:
        send(connection, STDERR, f"microVM {socket.gethostname()}: {error}\n".encode())
        send(connection, EXIT, b"126")
        return
    with process.stdout, process.stderr:
        threading.Thread(target=feed, args=(connection, process.stdin), daemon=True).start()
        follow(connection, process)


def guarded(connection):
    try:
        with connection:
            session(connection)
    except (EOFError, OSError, ValueError):
        pass  # the host hung up, or sent what is no request
    finally:
        SESSIONS.release()


def trusted(peer):
    """Whether the other end is the host's root."""
    cid, port = peer
    return cid == HOST_CID and (port < RESERVED_PORTS or hypervisor() == "Cloud Hypervisor")


def hypervisor():
    try:
        with open("/sys/class/dmi/id/sys_vendor", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""


def serve():
    """Answer for ever, unless it is switched off."""
    with open("/proc/cmdline", encoding="utf-8") as file:
        if "agentfleet_exec=off" in file.read().split():
            return
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((socket.VMADDR_CID_ANY, PORT))
    listener.listen(64)
    while True:
        SESSIONS.acquire()
        try:
            connection, peer = listener.accept()
        except OSError:
            SESSIONS.release()
            continue
        if trusted(peer):
            threading.Thread(target=guarded, args=(connection,), daemon=True).start()
        else:
            connection.close()
            SESSIONS.release()
