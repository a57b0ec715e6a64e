#!/usr/bin/env python3
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Pack the DOUBLES of 3FS and FoundationDB as archives that the roles install; prints the SHA-256 of each.

make_archive.py DIRECTORY [RELEASE]: writes 3fs-double-RELEASE.tar.gz and foundationdb-double.tar.gz. The same input
gives the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FDB = HERE.parent / "foundationdb" / "fdb_double.py"
THREEFS_NAMES = (
    "admin_cli",
    "clickhouse-client",
    "hf3fs_fuse_main",
    "meta_main",
    "mgmtd_main",
    "monitor_collector_main",
    "storage_main",
)
FDB_NAMES = ("backup_agent", "fdbbackup", "fdbcli", "fdbmonitor", "fdbrestore", "fdbserver")
# A program imports its double instead of being it: Python keeps what it compiles of modules only, and on an emulated CPU
# compiling takes longer than most commands.
PROGRAM = """#!/usr/bin/python3 -SE
# DOUBLE of a program of {what}: see {module}.py
from {module} import main

raise SystemExit(main())
"""


def programs(names: tuple[str, ...], what: str, module: str) -> dict[str, tuple[bytes, int]]:
    """The programs of a double: path -> content and mode."""
    return {f"bin/{name}": (PROGRAM.format(what=what, module=module).encode(), 0o755) for name in names}


def pack(path: Path, files: dict[str, tuple[bytes, int]]) -> str:
    """Write a reproducible archive; returns its SHA-256."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, (content, mode) in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.mode, member.size = mode, len(content)
            archive.addfile(member, io.BytesIO(content))
    data = gzip.compress(plain.getvalue(), mtime=0)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def main(directory: str, release: str = "1") -> dict[str, str]:
    """Make both archives in a directory; file name -> SHA-256."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    fdb = {"bin/fdb_double.py": (FDB.read_bytes(), 0o644)}
    files = {**fdb, "bin/threefs_double.py": ((HERE / "threefs_double.py").read_bytes(), 0o644)}
    files.update(programs(THREEFS_NAMES, "3FS", "threefs_double"))
    files["VERSION"] = (f"250228-double-{release}\n".encode(), 0o644)
    files["sql/3fs-monitor.sql"] = ((HERE / "3fs-monitor.sql").read_bytes(), 0o644)
    for path in sorted((HERE / "configs").glob("*.toml")):
        files[f"configs/{path.name}"] = (path.read_bytes(), 0o644)
    archives = {
        f"3fs-double-{release}.tar.gz": files,
        "foundationdb-double.tar.gz": {**fdb, **programs(FDB_NAMES, "FoundationDB", "fdb_double")},
    }
    return {name: pack(target / name, content) for name, content in archives.items()}


if __name__ == "__main__":
    for archive_name, digest in main(*sys.argv[1:]).items():
        sys.stdout.write(f"{digest}  {archive_name}\n")
