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
  - Builds images on the builder (usually the controller, with C(delegate_to=localhost)) from packages and files.
  - An image is an uncompressed EROFS file that guests map directly from the host's page cache (DAX), together with the
    distribution's kernel and a generated minimal initramfs. The SHA-256 of the EROFS file is the image's digest; the
    file contains the digests of kernel and initramfs, so that it stands for all three.
  - The result is one compressed bundle in the cache, found again by the digest of the definition. Changed contents of
    the mirror alone do not rebuild an image; remove its directory from the cache for that.
  - Needs mmdebstrap, erofs-utils 1.5 or newer, zstd and tar on the builder, and fakeroot when not run as root.
extends_documentation_fragment: agentfleet.metal.attributes
options:
  cache:
    description: Directory of built images.
    type: path
    default: ~/.cache/agentfleet/images
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
      family:
        description: Last part of the archive's path, by which the mirror is found in this machine's apt configuration.
        type: str
        default: debian
      suite:
        description: Suite of the distribution.
        type: str
        default: trixie
      components:
        description: Components of the archive.
        type: list
        elements: str
        default: [main]
      mirror:
        description: URI of the mirror. By default the one that this machine's own apt uses.
        type: str
      packages:
        description: Packages besides the essential ones.
        type: list
        elements: str
        default: [python3-minimal]
      kernel_package:
        description: Package with the guest kernel and its modules. The options that microVMs need are asserted.
        type: str
        default: linux-image-cloud-amd64
      python_requirements:
        description: Python packages, installed from wheels for the image's own Python. The image needs a Python.
        type: list
        elements: str
        default: []
      files:
        description: Files of the image, over those of the packages. Owned by root.
        type: list
        elements: dict
        default: []
        suboptions:
          path:
            description: Absolute path in the image.
            type: path
            required: true
          src:
            description: File on the builder. One of O(images[].files[].src) and O(images[].files[].content) is needed.
            type: path
          content:
            description: Text of the file.
            type: str
          mode:
            description: Octal mode.
            type: str
            default: "0644"
"""

EXAMPLES = r"""
- name: Build the image of the agents
  agentfleet.metal.rootfs_image:
    images:
      - name: agent
        packages: [python3]
        files:
          - path: /usr/lib/agentfleet/init
            src: /srv/agent/init
            mode: "0755"
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
  description: Name and digest of each image, as M(agentfleet.metal.image_store) takes them.
  returned: always
  type: list
  elements: dict
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
      description: SHA-256 of the EROFS file.
      type: str
    bundle:
      description: File to transfer to hosts.
      type: str
    bundle_sha256:
      description: SHA-256 of the bundle.
      type: str
    bundle_bytes:
      description: Size of the bundle.
      type: int
    size_bytes:
      description: Size of the EROFS file.
      type: int
    kernel_release:
      description: Release of the guest kernel.
      type: str
    packages:
      description: Package and version of all packages in the image.
      type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._image import Images
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge

ARGUMENTS = {
    "cache": {"type": "path", "default": "~/.cache/agentfleet/images"},
    "images": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "name": {"type": "str", "required": True},
            "family": {"type": "str", "default": "debian"},
            "suite": {"type": "str", "default": "trixie"},
            "components": {"type": "list", "elements": "str", "default": ["main"]},
            "mirror": {"type": "str"},
            "packages": {"type": "list", "elements": "str", "default": ["python3-minimal"]},
            "kernel_package": {"type": "str", "default": "linux-image-cloud-amd64"},
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
                },
            },
        },
    },
}


def build(params: dict, host: Host) -> Images:
    """The resource of one call; raises Refused for bad options."""
    return Images(host, params)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    converge(module, lambda: build(module.params, Host()))


if __name__ == "__main__":
    main()
