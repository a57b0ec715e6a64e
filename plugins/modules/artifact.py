#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module artifact: programs pinned by their SHA-256, one directory for each release."""

from __future__ import annotations

DOCUMENTATION = r"""
module: artifact
short_description: Unpack a release of a program that is pinned by its SHA-256
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Unpacks archives, packages or an image into a directory that is named by their digests, O(subdirectory) and O(build).
    Releases stand side by side; which one is used is the user's path, so that an upgrade or a way back is a change of that path.
  - Packages are unpacked, not installed. No maintainer script runs and the package manager does not know them.
  - What has another digest than the pinned one is refused, or, when it comes from a URL, never unpacked.
extends_documentation_fragment:
  - agentfleet.metal.attributes
options:
  sources:
    description: What makes the release; several packages are unpacked into one directory.
    type: list
    elements: dict
    required: true
    suboptions:
      src:
        description:
          - Absolute path, or URL. User and password in a URL are used to fetch it and are neither shown nor kept.
        type: str
        required: true
      sha256:
        description: Its SHA-256 in hexadecimal.
        type: str
        required: true
      kind:
        description:
          - What it is; told by the ending of its name if left out.
          - V(image) is an archive of C(podman save) or C(docker save), of which the file system is taken.
        type: str
        choices: [archive, package, image]
  directory:
    description: Directory of all releases.
    type: path
    required: true
  from_controller:
    description: Whether each O(sources[].src) is a path of the controller. Files are brought only to hosts without the release.
    type: bool
    default: false
  subdirectory:
    description: The part of what is unpacked that becomes the release, such as V(opt/3fs) of an image.
    type: str
  build:
    description: Shell commands that build a source tree, run in its top directory one after the other.
    type: list
    elements: str
    default: []
  build_timeout_seconds:
    description: How long each command may take.
    type: int
    default: 14400
  provides:
    description: Paths that the release must have; without one of them nothing is installed.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Unpack a release of 3FS
  agentfleet.metal.artifact:
    directory: /opt/3fs
    sources:
      - src: /var/tmp/3fs-250228.tar.gz
        sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    provides: [bin/admin_cli, configs/admin_cli.toml]
"""

RETURN = r"""
path:
  description: Directory of the release.
  returned: success
  type: str
installed:
  description: Whether it is there.
  returned: success
  type: bool
plan:
  description: The steps, each with verb, object, before, after, why and disruptive.
  returned: success
  type: list
  elements: dict
refused:
  description: Option, value, problem and remedy, when a wish is refused.
  returned: when a wish is refused
  type: dict
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url

from ansible_collections.agentfleet.metal.plugins.module_utils._artifact import Artifact, secrets
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge, unlogged


def build(params: t.Mapping[str, t.Any], host: Host) -> Artifact:
    """The resource that the options declare."""
    return Artifact(host, params, lambda url, seconds: open_url(url, timeout=seconds))


def main() -> None:
    """Entry point."""
    module = unlogged(AnsibleModule)(
        argument_spec={
            "sources": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "src": {"type": "str", "required": True},
                    "sha256": {"type": "str", "required": True},
                    "kind": {"type": "str", "choices": ["archive", "package", "image"]},
                },
            },
            "directory": {"type": "path", "required": True},
            "from_controller": {"type": "bool", "default": False},
            "subdirectory": {"type": "str"},
            "build": {"type": "list", "elements": "str", "default": []},
            "build_timeout_seconds": {"type": "int", "default": 14400},
            "provides": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    for source in module.params["sources"]:
        module.no_log_values |= secrets(source["src"])
    converge(module, lambda: build(module.params, Host()))


if __name__ == "__main__":
    main()
