# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The first program of a microVM, as a text, and what it reads.

This module is private to the collection and imports nothing of Ansible.

It is ``/init`` of the initramfs; a kernel that has everything built in mounts the image itself and starts the same
text from there. It needs busybox alone, but for volumes, whose programs (``blkid``, ``mkfs.*``) come from the image.

The disk with the serial ``agentfleet-config`` is a script that sets (one item a line)::

    agentfleet_hostname=NAME
    agentfleet_networks='MAC ADDRESS/LENGTH[,ADDRESS6/LENGTH] [GATEWAY[,GATEWAY6]]'
    agentfleet_images='UUID MOUNTPOINT FILESYSTEM OPTIONS'
    agentfleet_shares='TAG MOUNTPOINT OPTIONS'
    agentfleet_volumes='SERIAL MOUNTPOINT FILESYSTEM OPTIONS'
    agentfleet_upper=SERIAL         # volume (ext4, made and grown as needed) with the root's writable layer; tmpfs without
    agentfleet_init=PROGRAM
    agentfleet_environment='NAME=VALUE ...'   # of PROGRAM, quoted for the shell

Options of a volume are those of mount, and ``mkfs`` (make the file system if the volume is blank) and ``grow`` (let it fill
the volume). The disk with the serial ``agentfleet-data`` is a ustar, unpacked over the root once for each content.
"""

from __future__ import annotations

LIBRARY = "/usr/lib/agentfleet"
PATH = f"{LIBRARY}/early-init"
SETTINGS = f"{LIBRARY}/boot"  # shell variables: image_filesystem, image_options, image_verity (a device-mapper table)
# The guest's own programs are found in it, whatever PATH is to be.
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
APPLETS = (
    "sh cat chroot cmp cut env grep hexdump hostname insmod ip ls mkdir mount pivot_root poweroff rm sha256sum switch_root tar "
    "umount usleep"
).split()

SCRIPT = f"""\
#!{LIBRARY}/bin/sh
# First program of an agentfleet microVM: image, writable layer, name, addresses, volumes, shares, first-boot data.
export PATH={LIBRARY}/bin
image=/run/agentfleet/image root=/mnt/root
fail() {{
    echo "agentfleet: $*" >/dev/console
    poweroff -f
}}
load() {{ # LIST: modules, once; what is built in is in no list
    [ -e "/modules/$1" ] || return 0
    while read -r module; do
        insmod "/modules/$module" || fail "module $module does not load"
    done <"/modules/$1"
    rm "/modules/$1"
}}
disk() {{ # SERIAL: sets device
    for block in /sys/block/vd*; do
        serial=
        [ ! -e "$block/serial" ] || read -r serial <"$block/serial"
        [ "$serial" != "$1" ] || {{ device=/dev/${{block##*/}}; return; }}
    done
    return 1
}}
inside() {{ # TREE PROGRAM ...
    tree=$1
    shift
    mount -o bind /dev "$tree/dev" && mount -o bind /proc "$tree/proc" || return
    chroot "$tree" /usr/bin/env PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"
    code=$?
    umount "$tree/proc" && umount "$tree/dev" && return $code
}}
volume() {{ # SERIAL MOUNTPOINT FILESYSTEM OPTIONS
    disk "$1" || fail "volume $1 is not attached"
    flags='' mkfs='' grow='' IFS=,
    for option in $4; do
        case $option in
        mkfs | grow) eval "$option=yes" ;;
        *) flags=$flags,$option ;;
        esac
    done
    unset IFS
    load "$3"
    if [ -n "$mkfs" ] && cmp -s -n 1048576 "$device" /dev/zero && ! inside "$image" blkid -p "$device" >/dev/null; then
        inside "$image" "mkfs.$3" -q "$device" || fail "volume $1: mkfs.$3 does not work; does the image have it?"
    elif [ -n "$grow" ] && [ "$3" = ext4 ]; then
        # Block count and size from the superblock: resize2fs alone would want a full check at every start.
        blocks=$(hexdump -s 1028 -n 4 -e '1/4 "%u"' "$device") size=$((2 << $(hexdump -s 1048 -n 4 -e '1/4 "%u"' "$device")))
        read -r sectors <"/sys/block/${{device##*/}}/size"
        if [ $(((blocks + 1) * size)) -le "$sectors" ]; then
            inside "$image" e2fsck -fp "$device" >/dev/null
            inside "$image" resize2fs "$device" >/dev/null 2>&1 || fail "volume $1 does not grow"
        fi
    fi
    mkdir -p "$2" && mount -t "$3" -o "rw$flags" "$device" "$2" || fail "volume $1 does not mount as $3"
    if [ -n "$grow" ] && [ "$3" = xfs ]; then # grows where it is mounted, and does nothing if it fills the volume
        inside "$root" xfs_growfs "${{2#"$root"}}" >/dev/null || fail "volume $1 does not grow"
    fi
}}

pmem() {{ # UUID FILESYSTEM: sets device to the one whose file system has it
    at=1128
    [ "$2" != erofs ] || at=1072
    tries=0
    while [ $tries -lt 1000 ]; do
        for device in /dev/pmem*; do
            [ "$(hexdump -s $at -n 16 -e '16/1 "%02x"' "$device" 2>/dev/null)" != "$1" ] || return 0
        done
        tries=$((tries + 1))
        usleep 10000
    done
    return 1
}}
with_dax() {{ # MOUNTPOINT OPTIONS: fails where DAX was asked for and is not used, which file systems do silently
    case $2 in
    *dax=always*) grep -q " $1 [^ ]* [^ ]*dax=always" /proc/mounts ;;
    esac
}}

mount -t proc proc /proc && mount -t sysfs sys /sys || fail "no kernel file systems"
grep -q ' /dev devtmpfs ' /proc/mounts || mount -t devtmpfs dev /dev || fail "no devices"
mount -t tmpfs -o mode=755,nosuid,nodev run /run && mkdir -p "$image" || fail "no /run"
exec </dev/console >/dev/console 2>&1
load boot
. {SETTINGS}
agentfleet_init={LIBRARY}/init
if disk agentfleet-config; then
    (umask 077 && cat "$device" >/run/agentfleet/config)
    . /run/agentfleet/config
fi

if [ "$0" = /init ]; then
    tries=0
    until [ -b /dev/pmem0 ]; do
        tries=$((tries + 1))
        [ $tries -lt 1000 ] || fail "no /dev/pmem0: the image is not attached"
        usleep 10000
    done
    device=/dev/pmem0
    if [ -n "$image_verity" ]; then
        dmsetup create agentfleet-image --readonly --noudevsync --table "$image_verity" || fail "no verified image"
        device=/dev/dm-0
    fi
    mount -t "$image_filesystem" -o "$image_options" "$device" "$image" ||
        fail "the image does not mount with $image_options"
else
    mount -o bind / "$image" || fail "the image is nowhere"
fi
with_dax "$image" "$image_options" || fail "the image is mounted without DAX"
if [ -n "$agentfleet_upper" ]; then
    volume "$agentfleet_upper" /mnt ext4 mkfs,grow
else
    mount -t tmpfs -o mode=755,size=50% upper /mnt || fail "no writable layer"
fi
mkdir -p /mnt/data /mnt/work "$root" &&
    mount -t overlay -o "lowerdir=$image,upperdir=/mnt/data,workdir=/mnt/work" overlay "$root" ||
    fail "no writable layer"

[ -z "$agentfleet_hostname" ] || hostname "$agentfleet_hostname"
ip link set lo up
echo "$agentfleet_networks" | while read -r mac addresses gateways; do
    for device in /sys/class/net/*; do
        read -r have <"$device/address"
        [ -n "$mac" ] && [ "$have" = "$mac" ] || continue
        device=${{device##*/}} IFS=,
        # The host gave the addresses out: nothing to detect, nobody to ask.
        for setting in accept_dad accept_ra; do
            [ ! -e "/proc/sys/net/ipv6/conf/$device/$setting" ] || echo 0 >"/proc/sys/net/ipv6/conf/$device/$setting"
        done
        ip link set "$device" up
        for address in $addresses; do
            ip addr add "$address" dev "$device" || fail "address $address"
        done
        for gateway in $gateways; do
            case $gateway in
            *:*) ip -6 route add default via "$gateway" dev "$device" ;;
            *) ip route add default via "$gateway" dev "$device" ;;
            esac || fail "gateway $gateway"
        done
        unset IFS
    done
done
echo "$agentfleet_images" >/run/agentfleet/images
while read -r uuid target filesystem options; do
    [ -n "$uuid" ] || continue
    pmem "$uuid" "$filesystem" || fail "the image for $target is not attached"
    load "$filesystem"
    mkdir -p "$root$target" && mount -t "$filesystem" -o "$options" "$device" "$root$target" ||
        fail "the image for $target does not mount with $options"
    with_dax "$root$target" "$options" || fail "the image for $target is mounted without DAX"
done </run/agentfleet/images
echo "$agentfleet_volumes" >/run/agentfleet/volumes
while read -r serial target filesystem options; do
    [ -z "$serial" ] || volume "$serial" "$root$target" "$filesystem" "$options" </dev/null
done </run/agentfleet/volumes
echo "$agentfleet_shares" | while read -r tag target options; do
    [ -n "$tag" ] || continue
    mkdir -p "$root$target" && mount -t virtiofs -o "$options" "$tag" "$root$target" &&
        ls "$root$target" >/dev/null || fail "share $tag" # mounting alone does not ask the other end
done

# First-boot data: once for each content, however often the writable layer is kept.
content=none
if disk agentfleet-data; then
    content=$(sha256sum <"$device" | cut -c1-64)
fi
if ! grep -qsx "$content" "$root/var/lib/agentfleet/firstboot"; then
    rm -f "$root{LIBRARY}/firstboot.d/user-data" # of another content
    [ "$content" = none ] || tar -xf "$device" -C "$root" || fail "the first-boot data does not unpack"
    echo "$content" >/run/agentfleet/firstboot # init runs the scripts, and remembers
fi

load last
for directory in proc sys dev run; do
    mount -o move "/$directory" "$root/$directory" || fail "/$directory does not move to the image"
done
if [ "$0" != /init ]; then
    cd "$root" && pivot_root . mnt && umount -l /mnt || fail "no new root"
fi
set -- "$agentfleet_init"
[ "$0" != /init ] || set -- "$PATH/switch_root" "$root" "$@"
# The environment never becomes variables of this shell, which has names of its own.
eval exec env "PATH={SYSTEM_PATH} $agentfleet_environment" '"$@"'
"""
