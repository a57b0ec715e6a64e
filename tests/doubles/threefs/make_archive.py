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


def pack(path: Path, files: dict[str, tuple[bytes, int]], links: dict[str, str]) -> str:
    """Write a reproducible archive; returns its SHA-256."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted({**files, **links}):
            member = tarfile.TarInfo(name)
            if name in links:
                member.type, member.linkname = tarfile.SYMTYPE, links[name]
                archive.addfile(member)
            else:
                content, member.mode = files[name]
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    data = gzip.compress(plain.getvalue(), mtime=0)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def main(directory: str, release: str = "1") -> dict[str, str]:
    """Make both archives in a directory; file name -> SHA-256."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    program, fdb = (HERE / "threefs_double.py").read_bytes(), FDB.read_bytes()
    files = {"bin/threefs_double.py": (program, 0o755), "bin/fdb_double.py": (fdb, 0o644)}
    files["VERSION"] = (f"250228-double-{release}\n".encode(), 0o644)
    files["sql/3fs-monitor.sql"] = ((HERE / "3fs-monitor.sql").read_bytes(), 0o644)
    for path in sorted((HERE / "configs").glob("*.toml")):
        files[f"configs/{path.name}"] = (path.read_bytes(), 0o644)
    threefs = f"3fs-double-{release}.tar.gz"
    return {
        threefs: pack(target / threefs, files, {f"bin/{name}": "threefs_double.py" for name in THREEFS_NAMES}),
        "foundationdb-double.tar.gz": pack(
            target / "foundationdb-double.tar.gz",
            {"bin/fdb_double.py": (fdb, 0o755)},
            {f"bin/{name}": "fdb_double.py" for name in FDB_NAMES},
        ),
    }


if __name__ == "__main__":
    for archive_name, digest in main(*sys.argv[1:]).items():
        sys.stdout.write(f"{digest}  {archive_name}\n")
