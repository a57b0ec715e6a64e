#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module rootfs_image: see DOCUMENTATION."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rootfs_image
short_description: Build shared root file-system images for microVMs
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Builds images on the builder (usually the controller, with C(delegate_to=localhost)) from packages or OCI images, Python
    requirements, files, users and services.
  - An image is an uncompressed file that guests map directly from the host's page cache (DAX), together with a guest kernel
    and usually a generated minimal initramfs. The SHA-256 of the file is the image's digest; the file contains the digests
    of kernel and initramfs, so that it stands for all.
  - Builds are reproducible bit for bit while mirror and tools are the same.
  - The result is found again by the digest of the definition, and nothing is asked of the mirror then. When packages of the
    mirror changed, O(refresh=true) builds anew.
  - Beside the manifest of each image the cache has its build log and its bill of materials. A failed or interrupted build
    leaves the images that are there as they are.
  - Needs mmdebstrap, erofs-utils 1.5 or newer, zstd and tar on the builder, and fakeroot when not run as root; e2fsprogs
    1.47.1 or newer for ext4, cryptsetup-bin for verity, and debsbom (from PyPI) for the bill of materials.
extends_documentation_fragment: agentfleet.metal.attributes
options:
  cache:
    description: Directory of built images.
    type: path
    default: ~/.cache/agentfleet/images
  refresh:
    description: Build all O(images) anew, with the packages that the mirror has now.
    type: bool
    default: false
  images:
    description: The images.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the image, used to point at its digest on hosts.
        type: str
        required: true
      base:
        description:
          - Name of another image of this call that this one is made of. Kernel and distribution are the base's.
          - When the base changes, this image is built anew.
        type: str
      data:
        description:
          - Whether it is O(images[].directories), O(images[].files) and perhaps an OCI image alone, such as models, without an
            operating system and a kernel.
          - MicroVMs map it beside their root, see O(agentfleet.metal.microvm#module:instances[].data_images).
        type: bool
        default: false
      oci:
        description:
          - An OCI image instead of packages as what the image is made of. No container engine is needed.
          - All digests are verified; names and links that lead out of the image are refused; devices are left out.
        type: dict
        suboptions:
          path:
            description: Layout directory, or tar archive of one, on the builder.
            type: path
            required: true
          tag:
            description: Reference name of the image, where the layout has several.
            type: str
      family:
        description:
          - Last part of the archive's path, by which the mirror is found in this machine's apt configuration. V(debian) by default.
        type: str
      suite:
        description: Suite of the distribution, V(trixie) by default. With O(images[].oci) only the kernel comes from it.
        type: str
      components:
        description: Components of the archive, V([main]) by default.
        type: list
        elements: str
      mirror:
        description: URI of the mirror. By default the one that this machine's own apt uses.
        type: str
      packages:
        description:
          - Packages besides the essential ones. V([python3, e2fsprogs]) by default (the agent's and modules' Python, and volumes), and
            none for an image that is made of another one or of an OCI image.
        type: list
        elements: str
      kernel_package:
        description:
          - Package with the guest kernel and its modules, V(linux-image-cloud-amd64) by default. The options that microVMs need
            are asserted.
        type: str
      kernel_modules:
        description: Modules of that kernel that guests load besides what microVMs need, such as V(nvme) for a passed-through disk.
        type: list
        elements: str
      kernel_source:
        description:
          - Build the guest kernel from the distribution's source package instead, with everything built in, so that guests start
            without an initramfs. Needs a compiler and some minutes; the result is kept in the cache.
        type: dict
        suboptions:
          package:
            description: Package with the sources.
            type: str
            default: linux-source
          fragment:
            description: Lines of kernel configuration, over those that microVMs need. Each is asserted afterwards.
            type: str
      python_requirements:
        description:
          - Python packages, installed from wheels for the image's own Python. The image needs a Python.
          - With hashes (C(name==1.0 --hash=sha256:...)) all must have them, as pip demands.
        type: list
        elements: str
        default: []
      files:
        description: Files of the image, over those of the packages.
        type: list
        elements: dict
        default: []
        suboptions:
          path:
            description: Absolute path in the image.
            type: path
            required: true
          src:
            description: File on the builder. One of this and C(content) is needed.
            type: path
          content:
            description: Text of the file.
            type: str
          mode:
            description: Octal mode.
            type: str
            default: "0644"
          owner:
            description: User of the image, or a number.
            type: str
            default: root
          group:
            description: Group of the image, or a number.
            type: str
            default: root
      directories:
        description: Directories of the image, such as models or data.
        type: list
        elements: dict
        default: []
        suboptions:
          path:
            description: Absolute path in the image.
            type: path
            required: true
          src:
            description:
              - Directory on the builder whose content comes with it. Programs (by mode, or with a first
                line such as C(#!/bin/sh)) get mode 0755, other files 0644.
            type: path
          mode:
            description: Octal mode of the directory itself.
            type: str
            default: "0755"
          owner:
            description: User of the image, or a number; of all that is below, too.
            type: str
            default: root
          group:
            description: Group of the image, or a number; of all that is below, too.
            type: str
            default: root
      users:
        description: Users of the image, each with a group of its own. They have no password.
        type: list
        elements: dict
        default: []
        suboptions:
          name:
            description: Name of the user.
            type: str
            required: true
          uid:
            description: Number of the user and of its group.
            type: int
            required: true
          groups:
            description: Other groups of the image that the user is in.
            type: list
            elements: str
            default: []
          home:
            description: Home directory, C(/home/NAME) by default. It is made, with mode 0700.
            type: path
          shell:
            description: Shell, C(/usr/sbin/nologin) by default.
            type: path
      services:
        description: Programs that the microVM's init runs, and starts again when they end. They need no systemd.
        type: list
        elements: dict
        default: []
        suboptions:
          name:
            description: Name of the service.
            type: str
            required: true
          command:
            description: Program with its arguments.
            type: list
            elements: str
            required: true
          user:
            description: User that it runs as.
            type: str
            default: root
          environment:
            description: Variables, over those that the microVM has. Not for secrets; every guest can read the image.
            type: dict
            default: {}
      units:
        description: Units of systemd, for images that have it (package C(systemd-sysv)).
        type: list
        elements: dict
        default: []
        suboptions:
          name:
            description: Name of the unit with its suffix.
            type: str
            required: true
          src:
            description: File on the builder. One of this and C(content) is needed.
            type: path
          content:
            description: Text of the unit.
            type: str
          enabled:
            description: Whether it starts as its C([Install]) section says.
            type: bool
            default: true
      filesystem:
        description:
          - File system of the image. V(erofs) is smaller and starts faster; V(ext4) (without journal) is for kernels without EROFS.
        type: str
        choices: [erofs, ext4]
        default: erofs
      dax:
        description: Whether guests map the image from the host's memory instead of copying what they read.
        type: bool
        default: true
      verity:
        description:
          - Whether guests verify each block that they read (dm-verity). It excludes O(images[].dax), since device-mapper's verity
            target reads through the page cache of the guest.
        type: bool
        default: false
      sbom:
        description:
          - Whether a bill of materials is kept beside the image's manifest (CycloneDX, by debsbom). By default it is where the
            builder has debsbom, with a warning where not.
        type: bool
"""

EXAMPLES = r"""
- name: Build the image of the agents, and one with a model and a worker on top of it
  agentfleet.metal.rootfs_image:
    images:
      - name: agent
        packages: [python3, e2fsprogs]
        files:
          - path: /usr/lib/agentfleet/init
            src: /srv/agent/init
            mode: "0755"
      - name: agent-model
        base: agent
        python_requirements: [numpy==2.3.4]
        directories:
          - path: /opt/models/small
            src: /srv/models/small
        users:
          - name: worker
            uid: 1000
        services:
          - name: worker
            command: [/usr/bin/python3, -m, worker]
            user: worker
  delegate_to: localhost
  run_once: true

- name: A model of its own, which microVMs of any image map beside their root
  agentfleet.metal.rootfs_image:
    images:
      - name: model-7b
        data: true
        directories: [{path: /weights, src: /srv/models/7b}]
  delegate_to: localhost
  run_once: true

- name: An image from a container, with a kernel of its own that needs no initramfs
  agentfleet.metal.rootfs_image:
    images:
      - name: tool
        oci:
          path: /srv/images/tool.tar
        kernel_source:
          package: linux-source
          fragment: |
            CONFIG_WIREGUARD=y
  delegate_to: localhost
  run_once: true
"""

RETURN = r"""
plan:
  description: The builds, each with its definition.
  returned: always
  type: list
  elements: dict
store:
  description: Name, digest and files of each image, as M(agentfleet.metal.image_store) takes them.
  returned: always
  type: list
  elements: dict
blobs:
  description: Directory of the compressed files that hosts may need.
  returned: always
  type: str
images:
  description: The images. Digests are empty and sizes 0 in check mode when the image is not built yet.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: Name of the image.
      type: str
    definition_digest:
      description: SHA-256 of the definition.
      type: str
    image_digest:
      description: SHA-256 of the image.
      type: str
    size_bytes:
      description: Size of the image.
      type: int
    filesystem:
      description: File system of the image.
      type: str
    kernel_release:
      description: Release of the guest kernel.
      type: str
    packages:
      description: Package and version of all packages in the image.
      type: dict
    python_packages:
      description: Name and version of all Python packages that pip installed in the image.
      type: dict
    log:
      description: File with the commands of the build and what they said.
      type: str
    sbom:
      description: File with the bill of materials. Empty when there is none.
      type: str
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._image import Images
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge

ARGUMENTS = {
    "cache": {"type": "path", "default": "~/.cache/agentfleet/images"},
    "refresh": {"type": "bool", "default": False},
    "images": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "name": {"type": "str", "required": True},
            "base": {"type": "str"},
            "data": {"type": "bool", "default": False},
            "oci": {
                "type": "dict",
                "options": {
                    "path": {"type": "path", "required": True},
                    "tag": {"type": "str"},
                },
            },
            "family": {"type": "str"},
            "suite": {"type": "str"},
            "components": {"type": "list", "elements": "str"},
            "mirror": {"type": "str"},
            "packages": {"type": "list", "elements": "str"},
            "kernel_package": {"type": "str"},
            "kernel_modules": {"type": "list", "elements": "str"},
            "kernel_source": {
                "type": "dict",
                "options": {
                    "package": {"type": "str", "default": "linux-source"},
                    "fragment": {"type": "str"},
                },
            },
            "python_requirements": {"type": "list", "elements": "str", "default": []},
            "files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "path", "required": True},
                    "src": {"type": "path"},
                    "content": {"type": "str"},
                    "mode": {"type": "str", "default": "0644"},
                    "owner": {"type": "str", "default": "root"},
                    "group": {"type": "str", "default": "root"},
                },
            },
            "directories": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "path", "required": True},
                    "src": {"type": "path"},
                    "mode": {"type": "str", "default": "0755"},
                    "owner": {"type": "str", "default": "root"},
                    "group": {"type": "str", "default": "root"},
                },
            },
            "users": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "uid": {"type": "int", "required": True},
                    "groups": {"type": "list", "elements": "str", "default": []},
                    "home": {"type": "path"},
                    "shell": {"type": "path"},
                },
            },
            "services": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "command": {"type": "list", "elements": "str", "required": True},
                    "user": {"type": "str", "default": "root"},
                    "environment": {"type": "dict", "default": {}},
                },
            },
            "units": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "src": {"type": "path"},
                    "content": {"type": "str"},
                    "enabled": {"type": "bool", "default": True},
                },
            },
            "filesystem": {"type": "str", "choices": ["erofs", "ext4"], "default": "erofs"},
            "dax": {"type": "bool", "default": True},
            "verity": {"type": "bool", "default": False},
            "sbom": {"type": "bool"},
        },
    },
}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    converge(module, lambda: Images(Host(), module.params))


if __name__ == "__main__":
    main()
