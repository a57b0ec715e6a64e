# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The store verifies what arrives, switches names, sends nothing twice, and stays whole after a failure."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import typing as t
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _store
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step, apply_all
from ansible_collections.agentfleet.metal.plugins.module_utils._store import BLOBS, STORE, Store

pytestmark = pytest.mark.skipif(not shutil.which("zstd"), reason="zstd is needed to make what arrives")
KERNEL, INITRD = b"kernel", b"initrd"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def built(root: Path, name: str, content: bytes, base: bytes | None = None, kernel: bytes = KERNEL) -> dict[str, t.Any]:
    """What rootfs_image returns for one image; its blobs are below <root>/cache."""
    data = {"rootfs.erofs": content, "kernel": kernel, "initrd": INITRD}
    files: dict[str, t.Any] = {n: {"sha256": sha256(d), "size_bytes": len(d)} for n, d in data.items()}
    data["manifest.json"] = json.dumps({"files": files, "kernel_release": "6.12"}).encode()
    files["manifest.json"] = {"sha256": sha256(data["manifest.json"]), "size_bytes": len(data["manifest.json"])}
    cache = root / "cache"
    cache.mkdir(exist_ok=True)
    for one in data.values():
        compress(one, cache / f"{sha256(one)}.zst")
    if base is not None:
        (root / "base").write_bytes(base)
        delta = _store.delta_name(sha256(content), sha256(base))
        compress(content, cache / delta, "--long=31", f"--patch-from={root / 'base'}")
    return {"name": name, "digest": sha256(content), "files": files, "deltas": [sha256(base)] if base else []}


def compress(data: bytes, target: Path, *options: str) -> None:
    source = target.with_suffix(".plain")
    source.write_bytes(data)
    subprocess.run(["zstd", "-qf", *options, source, "-o", target], check=True)
    source.unlink()


def store(host: Host, *images: t.Mapping[str, t.Any], **options: t.Any) -> Store:
    defaults = {
        "state": "present", "incoming": None, "verify": False, "gc": False, "keep": 0, "keep_seconds": 0,
    }  # fmt: skip
    full = [{"files": {}, "deltas": [], "digest": None, **image} for image in images]
    return Store(host, {**defaults, **options, "images": full})


def run(resource: Store) -> list[Step]:
    steps = resource.plan(resource.observe())
    apply_all(resource, steps)
    return steps


def send(root: Path, *images: t.Mapping[str, t.Any], **options: t.Any) -> list[str]:
    """What role rootfs does; returns the names of the files that were sent."""
    host = Host(str(root))
    first = store(host, *images, **options)
    run(first)
    blobs: list[str] = first.result(first.observe())["blobs"]
    (root / "in").mkdir(exist_ok=True)
    for blob in blobs:
        shutil.copy(root / "cache" / blob, root / "in" / f"agentfleet-{blob}")
    run(store(host, *images, incoming="/in", **options))
    return blobs


def path(root: Path, digest: str, name: str = "rootfs.erofs") -> Path:
    return root / _store.image_path(digest, name)[1:]


def test_register_and_point_then_nothing(tmp_path: Path) -> None:
    image = built(tmp_path, "agent", b"one")
    assert len(send(tmp_path, image)) == 4
    host = Host(str(tmp_path))
    assert run(store(host, image, incoming="/in")) == []
    assert host.names("/in") == []
    file = path(tmp_path, image["digest"])
    assert file.read_bytes() == b"one" and file.stat().st_mode & 0o777 == 0o444
    again = store(host, image)
    assert again.result(again.observe()) == {
        "images": [{"digest": image["digest"], "names": ["agent"], "size_bytes": 3, "kernel_release": "6.12"}],
        "missing": [],
        "blobs": [],
        "damaged": [],
    }


def test_what_two_images_share_is_sent_and_stored_once(tmp_path: Path) -> None:
    one, two = built(tmp_path, "one", b"one"), built(tmp_path, "two", b"two")
    assert len(send(tmp_path, one)) == 4
    assert sorted(send(tmp_path, one, two)) == sorted(
        f"{two['files'][name]['sha256']}.zst" for name in ("rootfs.erofs", "manifest.json")
    )
    kernels = [path(tmp_path, image["digest"], "kernel").stat() for image in (one, two)]
    assert kernels[0].st_ino == kernels[1].st_ino and kernels[0].st_nlink == 3


def test_two_images_of_one_call_name_a_shared_file_once(tmp_path: Path) -> None:
    images = built(tmp_path, "one", b"one"), built(tmp_path, "two", b"two")
    blobs = send(tmp_path, *images)
    assert len(blobs) == len(set(blobs)) == 6


def test_an_image_comes_as_the_difference_to_its_base(tmp_path: Path) -> None:
    base = os.urandom(1 << 20)
    one = built(tmp_path, "one", base)
    two = built(tmp_path, "two", base[: 1 << 19] + b"more" + base[1 << 19 :], base=base)
    send(tmp_path, one)
    blobs = send(tmp_path, two)
    delta = next(blob for blob in blobs if blob.startswith(two["digest"]))
    assert delta == f"{two['digest']}.from-{one['digest']}.zst"
    assert (tmp_path / "cache" / delta).stat().st_size < 1000
    assert sha256(path(tmp_path, two["digest"]).read_bytes()) == two["digest"]


def test_without_its_base_an_image_comes_whole(tmp_path: Path) -> None:
    two = built(tmp_path, "two", b"base and more", base=b"base")
    assert f"{two['digest']}.zst" in send(tmp_path, two)


def test_a_base_that_arrives_in_the_same_call_will_do(tmp_path: Path) -> None:
    one = built(tmp_path, "one", b"base")
    two = built(tmp_path, "two", b"base and more", base=b"base")
    blobs = send(tmp_path, one, two)
    assert f"{one['digest']}.zst" in blobs and f"{two['digest']}.zst" not in blobs
    assert path(tmp_path, two["digest"]).read_bytes() == b"base and more"


def test_a_name_moves_and_the_old_image_stays(tmp_path: Path) -> None:
    old, new = built(tmp_path, "agent", b"old"), built(tmp_path, "agent", b"new")
    send(tmp_path, old)
    send(tmp_path, new)
    host = Host(str(tmp_path))
    assert _store.named(host) == {"agent": new["digest"]}
    assert path(tmp_path, old["digest"]).exists()
    (step,) = run(store(host, old))  # back without a transfer
    assert (step.verb, step.before, step.after) == ("point", new["digest"], old["digest"])


@pytest.mark.parametrize("spoil", ["other", "cut", "none"])
def test_what_arrives_damaged_changes_nothing(tmp_path: Path, spoil: str) -> None:
    image = built(tmp_path, "agent", b"one" * 1000)
    blob = tmp_path / "cache" / f"{image['files']['initrd']['sha256']}.zst"
    if spoil == "other":
        compress(b"other", blob)
    elif spoil == "cut":
        blob.write_bytes(blob.read_bytes()[:-3])
    else:
        blob.write_bytes(b"no zstd")
    with pytest.raises(HostError, match="initrd of image agent arrived damaged"):
        send(tmp_path, image)
    host = Host(str(tmp_path))
    assert _store.stored(host) == {} and _store.named(host) == {}
    assert [name for name in host.names(STORE) if name != "blobs"] == []


def test_a_file_that_did_not_arrive(tmp_path: Path) -> None:
    image = built(tmp_path, "agent", b"one")
    with pytest.raises(HostError, match="initrd of image agent did not arrive in /in"):
        run(store(Host(str(tmp_path)), image, incoming="/in"))


def test_the_manifest_of_another_image(tmp_path: Path) -> None:
    one, two = built(tmp_path, "one", b"one"), built(tmp_path, "two", b"two")
    one["files"]["manifest.json"] = two["files"]["manifest.json"]
    with pytest.raises(HostError, match="the manifest is not that of"):
        send(tmp_path, one)
    assert _store.stored(Host(str(tmp_path))) == {}


def test_an_interrupted_registration_is_repeated(tmp_path: Path) -> None:
    image = built(tmp_path, "agent", b"one")
    left = tmp_path / STORE[1:] / ".arriving-old"
    left.mkdir(parents=True)
    (left / "blob").write_bytes(b"half")
    send(tmp_path, image)
    assert not left.exists() and path(tmp_path, image["digest"]).exists()


def test_missing_is_told_not_refused(tmp_path: Path) -> None:
    image = built(tmp_path, "agent", b"one")
    resource = store(Host(str(tmp_path)), image)
    observed = resource.observe()
    assert resource.plan(observed) == []
    assert resource.result(observed)["missing"] == ["agent"]


def test_check_mode_before_the_image_is_built(tmp_path: Path) -> None:
    first = store(Host(str(tmp_path)), {"name": "agent", "digest": ""})
    first.predicting = True
    assert first.plan(first.observe()) == []
    assert first.result(first.observe())["blobs"] == ["not-built-yet"]
    second = store(Host(str(tmp_path)), {"name": "agent", "digest": ""}, incoming="/in")
    second.predicting = True
    assert [s.verb for s in second.plan(second.observe())] == ["register", "point"]


def test_a_full_file_system_is_refused_before_the_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_store, "free_bytes", lambda path: 10 << 20)
    image = built(tmp_path, "agent", b"one")
    resource = store(Host(str(tmp_path)), image)
    with pytest.raises(Refused, match=r"need 64 MiB in /var/lib/agentfleet/images, which has 10 MiB free"):
        resource.plan(resource.observe())


def test_a_full_file_system_leaves_the_old_image(tmp_path: Path) -> None:
    """zstd really runs into the limit of a file's size, which is what a full disk is to it."""
    old = built(tmp_path, "agent", b"old")
    send(tmp_path, old)
    new = built(tmp_path, "agent", os.urandom(1 << 20))
    blobs = [f"{file['sha256']}.zst" for file in new["files"].values()]
    for blob in blobs:
        shutil.copy(tmp_path / "cache" / blob, tmp_path / "in" / f"agentfleet-{blob}")
    limit = shutil.which("prlimit")
    if limit is None:
        pytest.skip("prlimit limits the size of files")

    class Limited(Host):
        def run(self, argv: t.Sequence[str], *args: t.Any, **kwargs: t.Any) -> t.Any:
            return super().run([str(limit), "--fsize=65536", *argv], *args, **kwargs)

    with pytest.raises(HostError, match="rootfs.erofs of image agent arrived damaged|is full"):
        run(store(Limited(str(tmp_path)), new, incoming="/in"))
    host = Host(str(tmp_path))
    assert _store.named(host) == {"agent": old["digest"]} and path(tmp_path, old["digest"]).read_bytes() == b"old"
    assert not [name for name in host.names(STORE) if name.startswith(".")]


# -- damage -----------------------------------------------------------------------


def damage(root: Path, image: t.Mapping[str, t.Any], name: str = "rootfs.erofs") -> None:
    file = path(root, image["digest"], name)
    file.chmod(0o644)
    with file.open("r+b") as opened:
        opened.write(b"X")


def test_damage_is_named(tmp_path: Path) -> None:
    image = built(tmp_path, "agent", b"one")
    send(tmp_path, image)
    assert run(store(Host(str(tmp_path)), verify=True)) == []
    damage(tmp_path, image)
    with pytest.raises(HostError) as error:
        run(store(Host(str(tmp_path)), verify=True))
    assert f"image {image['digest']} (agent): rootfs.erofs is damaged" in str(error.value)
    assert sha256(b"Xne") in str(error.value)


def test_damage_is_repaired_by_sending_the_file_again(tmp_path: Path) -> None:
    image, other = built(tmp_path, "agent", b"one"), built(tmp_path, "other", b"two")
    send(tmp_path, image, other)
    damage(tmp_path, image, "kernel")  # shared by both
    with path(tmp_path, image["digest"], "kernel").open("rb") as running:
        assert send(tmp_path, image, other, verify=True) == [f"{sha256(KERNEL)}.zst"]
        assert running.read() == b"Xernel"  # whoever has it open keeps it
    assert path(tmp_path, image["digest"], "kernel").read_bytes() == KERNEL
    assert run(store(Host(str(tmp_path)), image, other, verify=True)) == []


def test_damage_of_a_shared_file_is_repaired_for_all_by_sending_one(tmp_path: Path) -> None:
    image, other = built(tmp_path, "agent", b"one"), built(tmp_path, "other", b"two")
    send(tmp_path, image, other)
    damage(tmp_path, image, "initrd")
    assert send(tmp_path, image, verify=True) == [f"{sha256(INITRD)}.zst"]
    assert path(tmp_path, other["digest"], "initrd").read_bytes() == INITRD
    assert run(store(Host(str(tmp_path)), verify=True)) == []


@pytest.mark.parametrize("name", ["kernel", "rootfs.erofs"])
def test_what_a_power_cut_left_short_is_sent_again_without_verification(tmp_path: Path, name: str) -> None:
    image = built(tmp_path, "agent", b"one")
    send(tmp_path, image)
    whole = path(tmp_path, image["digest"], name).read_bytes()
    path(tmp_path, image["digest"], name).chmod(0o644)
    os.truncate(path(tmp_path, image["digest"], name), 0)
    assert send(tmp_path, image) == [f"{sha256(whole)}.zst"]
    assert path(tmp_path, image["digest"], name).read_bytes() == whole
    assert run(store(Host(str(tmp_path)), image, incoming="/in")) == []


def test_a_repair_that_was_cut_off_before_the_image_had_it_is_finished(tmp_path: Path) -> None:
    image = built(tmp_path, "agent", b"one")
    send(tmp_path, image)
    kernel = path(tmp_path, image["digest"], "kernel")
    kernel.unlink()
    kernel.write_bytes(b"")
    assert send(tmp_path, image) == []  # the blob is there
    assert kernel.read_bytes() == KERNEL
    assert run(store(Host(str(tmp_path)), image, incoming="/in")) == []


def test_nothing_has_its_name_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    calls = {"fsync": os.fsync, "replace": os.replace, "rename": os.rename}

    def spy(verb: str) -> t.Callable[..., None]:
        def call(what: t.Any, *target: t.Any) -> None:
            where = os.readlink(f"/proc/self/fd/{what}") if verb == "fsync" else str(target[0])
            calls[verb](what, *target)
            done.append((verb, re.sub(r"\.arriving-[^/]*", "arriving", os.path.relpath(where, tmp_path / STORE[1:]))))

        return call

    image = built(tmp_path, "agent", b"one")
    for verb in calls:
        monkeypatch.setattr(os, verb, spy(verb))
    send(tmp_path, image)
    blobs = [("replace", f"blobs/{file['sha256']}") for _name, file in sorted(image["files"].items())]
    expected = [one for blob in blobs for one in (("fsync", "arriving/blob"), blob)]
    expected += [
        ("fsync", "blobs"),
        ("fsync", "arriving/image"),
        ("rename", image["digest"]),
        ("fsync", image["digest"]),
    ]
    assert done == [*expected, ("fsync", "."), ("replace", "names/agent")]


# -- garbage ------------------------------------------------------------------------


def images_left(root: Path) -> set[str]:
    return set(_store.stored(Host(str(root))))


def test_garbage_is_what_nobody_uses(tmp_path: Path) -> None:
    digests = {}
    for name in ("named", "declared", "running", "snapshot", "mapped", "opened", "unused"):
        image = built(tmp_path, name, name.encode(), kernel=name[:2].encode())
        send(tmp_path, image)
        digests[name] = image["digest"]
        if name != "named":
            run(store(Host(str(tmp_path)), {"name": name}, state="absent"))

    def write(file: str, text: str) -> None:
        target = tmp_path / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    write("var/lib/agentfleet/microvms/a/spec.json", json.dumps({"image_digest": digests["declared"]}))
    write("run/agentfleet/b.spec.json", json.dumps({"kernel": f"{STORE}/{digests['running']}/kernel"}))
    write("var/lib/agentfleet/volumes/b/a.json", digests["unused"])  # a VMM's, which says nothing
    write("var/lib/agentfleet/snapshots/warm/snapshot.json", json.dumps({"spec": {"image": digests["snapshot"]}}))
    write("proc/17/maps", f"7f00-7fff r--s 0 fe:00 1 {STORE}/{digests['mapped']}/rootfs.erofs\n")
    (tmp_path / "proc/18/fd").mkdir(parents=True)
    (tmp_path / "proc/18/fd/5").symlink_to(f"{STORE}/{digests['opened']}/rootfs.erofs")

    (step,) = run(store(Host(str(tmp_path)), gc=True))
    assert (step.verb, step.object) == ("remove", f"image {digests['unused']}")
    assert images_left(tmp_path) == set(digests.values()) - {digests["unused"]}
    assert not (tmp_path / BLOBS[1:] / sha256(b"un")).exists()
    assert (tmp_path / BLOBS[1:] / sha256(INITRD)).exists()  # the others have it, too
    assert run(store(Host(str(tmp_path)), gc=True)) == []


def test_garbage_keeps_the_latest(tmp_path: Path) -> None:
    digests = []
    for number in range(3):
        image = built(tmp_path, "agent", b"%d" % number)
        send(tmp_path, image)
        os.utime(path(tmp_path, image["digest"]).parent, (number, number))
        digests.append(image["digest"])
    run(store(Host(str(tmp_path)), gc=True, keep=1))
    assert images_left(tmp_path) == set(digests[1:])
    recent = path(tmp_path, digests[1]).parent
    os.utime(recent)
    assert run(store(Host(str(tmp_path)), gc=True, keep_seconds=3600)) == []


def test_a_name_goes_and_its_image_with_it(tmp_path: Path) -> None:
    image = built(tmp_path, "agent", b"one")
    send(tmp_path, image)
    assert [s.verb for s in run(store(Host(str(tmp_path)), {"name": "agent"}, state="absent", gc=True))] == [
        "unname",
        "remove",
    ]
    assert images_left(tmp_path) == set() and Host(str(tmp_path)).names(BLOBS) == []
    assert run(store(Host(str(tmp_path)), {"name": "agent"}, state="absent", gc=True)) == []


def test_an_image_that_came_into_use_meanwhile_stays(tmp_path: Path) -> None:
    image = built(tmp_path, "agent", b"one")
    send(tmp_path, image)
    resource = store(Host(str(tmp_path)), {"name": "agent"}, state="absent", gc=True)
    steps = resource.plan(resource.observe())
    spec = tmp_path / "var/lib/agentfleet/microvms/a/spec.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"image_digest": image["digest"]}))
    with pytest.raises(HostError, match="is in use by /var/lib/agentfleet/microvms/a/spec.json"):
        apply_all(resource, steps)
    assert images_left(tmp_path) == {image["digest"]}
