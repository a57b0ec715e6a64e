# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Users of a 3FS cluster and their tokens.

Users live in FoundationDB, so that they can be made before any service runs. A new
token does not end the old one: that lives on for days, in which it is replaced
everywhere, and ends at once only when that is asked for.
"""

from __future__ import annotations

import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs import check_cluster, check_token
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_admin import STATUS, Admin, quote

_NAME = re.compile(r"^[A-Za-z0-9][\w.-]{0,63}$")
_AUTHENTICATION = STATUS["AuthenticationFail"]


class Users:
    """Users of one cluster as a resource.

    :param params: options of the module ``threefs_user``
    """

    predicting = False

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.cluster = check_cluster(params["cluster"])
        self.days = int(params.get("old_token_days", 7))
        if not 0 <= self.days <= 365:
            raise Refused("old_token_days", self.days, "not a number of days", "0 to 365; 0 ends old tokens at once")
        self.users: dict[int, dict[str, t.Any]] = {}
        for index, given in enumerate(params["users"]):
            option = f"users[{index}]"
            user = self._user(option, given)
            if user["uid"] in self.users:
                raise Refused(f"{option}.uid", user["uid"], "another user of the list has it", "Give each its own uid")
            if any(user["name"] == other["name"] for other in self.users.values()):
                raise Refused(
                    f"{option}.name", user["name"], "another user of the list has it", "Give each its own name"
                )
            self.users[user["uid"]] = user
        self.admins = [user for user in self.users.values() if user["admin"] and user["state"] == "present"]
        tokens = params.get("admin_tokens") or [token for user in self.admins for token in user["tokens"]]
        self.admin_tokens = [check_token(f"admin_tokens[{index}]", token) for index, token in enumerate(tokens)]
        self._acting = ""

    @staticmethod
    def _user(option: str, given: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        uid = int(given["uid"])
        if not 0 <= uid < 1 << 32:
            raise Refused(f"{option}.uid", uid, "not a user id", "0 to 4294967295")
        state = given.get("state") or "present"
        name = str(given.get("name") or "")
        if state == "present" and not _NAME.match(name):
            raise Refused(f"{option}.name", name, "not a name for a user", "Use letters, digits, . _ and -")
        if state == "absent" and uid == 0:
            raise Refused(
                f"{option}.state",
                state,
                "uid 0 is the one that administrates the cluster",
                "Leave it, or change its token",
            )
        tokens = []
        if state == "present":
            if not given.get("token"):
                raise Refused(
                    f"{option}.token",
                    None,
                    "a user needs a token",
                    "Make one with the filter agentfleet.metal.threefs_token",
                )
            tokens.append(check_token(f"{option}.token", given["token"], uid))
        if given.get("previous_token"):
            tokens.append(check_token(f"{option}.previous_token", given["previous_token"], uid))
        return {
            "uid": uid,
            "name": name,
            "state": state,
            "tokens": tokens,
            "root": bool(given.get("root")),
            "admin": bool(given.get("admin")),
            "groups": sorted(int(gid) for gid in given.get("groups") or []),
        }

    # -- observe -----------------------------------------------------------------------

    def observe(self) -> dict[str, t.Any]:
        """The users that the cluster has; under which token of ours it lets us look."""
        admin = Admin(self.host, self.cluster)
        if not admin.ready:
            if not self.predicting:
                admin.refuse_unready()
            return {"ready": False, "users": {}, "empty": True}
        errors = []
        for token in self.admin_tokens:
            answer = Admin(self.host, self.cluster, token).run("user-list", allow={_AUTHENTICATION})[0]
            if not answer.error:
                self._acting = token
                return {"ready": True, "empty": False, "users": {int(row["Uid"]): row for row in answer.table()}}
            errors.append(answer.error)
        if any(re.search(r"Uid \d+ not found", error) for error in errors):
            # there is no such user yet; whether there is any, the first user-add will tell
            return {"ready": True, "empty": True, "users": {}}
        if self.predicting and not errors:
            return {"ready": False, "users": {}, "empty": True}
        raise HostError(
            f"no token given is one of an admin of {self.cluster}: {errors[-1] if errors else 'there is none'}. "
            "Give the token in force as previous_token, or as admin_tokens"
        )

    # -- plan ----------------------------------------------------------------------------

    def plan(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        """Add, change, remove; tokens are never shown."""
        present = [user for user in self.users.values() if user["state"] == "present"]
        if observed["empty"] and present and not self.admins:
            raise Refused(
                "users",
                [user["name"] for user in present],
                "the first user must be an admin",
                "Set admin: true for uid 0",
            )
        steps = []
        for user in sorted(present, key=lambda user: not user["admin"]):
            now = observed["users"].get(user["uid"])
            label = f"user {user['uid']} {user['name']}"
            if now is None:
                steps.append(Step("add", label, after=_shown(user), data=("add", user)))
                continue
            if _attributes(now)["groups"] and not user["groups"]:
                raise Refused(
                    "users",
                    label,
                    "admin_cli cannot take the last group from a user",
                    "Keep one group, or remove and add the user",
                )
            if _attributes(now) != _attributes_of(user):
                steps.append(
                    Step("change", label, before=_attributes(now), after=_attributes_of(user), data=("set", user))
                )
            if now["Token"] != user["tokens"][0]:
                why = "the old one ends at once" if not self.days else f"the old one ends in {self.days} days"
                steps.append(Step("set token of", label, why=why, disruptive=not self.days, data=("token", user)))
        gone = [user for user in self.users.values() if user["state"] == "absent" and user["uid"] in observed["users"]]
        for user in gone:
            name = observed["users"][user["uid"]]["Name"]
            steps.append(Step("remove", f"user {user['uid']}", before=name, data=("remove", user)))
        return steps

    # -- apply -----------------------------------------------------------------------------

    def apply(self, step: Step) -> None:
        """One command of admin_cli."""
        verb, user = step.data
        admin = Admin(self.host, self.cluster, self._acting or (self.admin_tokens[0] if self.admin_tokens else ""))
        uid = user["uid"]
        groups = f" --groups {','.join(map(str, user['groups']))}" if user["groups"] else ""
        if verb == "add":
            flags = "".join(f" --{flag}" for flag in ("root", "admin") if user[flag])
            admin.run(f"user-add{flags}{groups} --token {user['tokens'][0]} {uid} {quote(user['name'])}")
        elif verb == "set":
            admin.run(
                f"user-set {uid} --name {quote(user['name'])} --root {user['root']:d} --admin {user['admin']:d}{groups}"
            )
        elif verb == "token":
            old = f"--last-token-lifetime-days {self.days}" if self.days else "--invalidate-existed-tokens"
            admin.run(f"user-set-token {uid} --token {user['tokens'][0]} {old}")
            if self._acting in user["tokens"]:
                self._acting = user["tokens"][0]
        else:
            admin.run(f"user-remove {uid}")

    def result(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """The users without their tokens."""
        return {
            "users": [
                {"uid": uid, **_attributes(row), "token_current": row["Token"] == self.users[uid]["tokens"][0]}
                for uid, row in sorted(observed["users"].items())
                if uid in self.users and self.users[uid]["tokens"]
            ]
        }


def _attributes(row: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    return {
        "name": row["Name"],
        "root": row["IsRoot"] == "true",
        "admin": row["IsAdmin"] == "true",
        "groups": sorted(int(gid) for gid in re.findall(r"\d+", row.get("Gids", ""))),
    }


def _attributes_of(user: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    return {key: user[key] for key in ("name", "root", "admin", "groups")}


def _shown(user: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    return {"uid": user["uid"], **_attributes_of(user)}
