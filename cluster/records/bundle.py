"""The bundle: the immutable manifest of everything a release stands on. Its id is the hash of its content.

A response whose version stamps are not a bundle is a bug; a release with a missing member is refused (requirement 76).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from rl_actors.contracts import BadInputError, TamperedError
from rl_actors.durable import encode, sha256_file, sha256_json, write_json

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_ROOT: Final = Path(__file__).resolve().parents[2]
_PACKAGES: Final = ("rl_actors", "serving", "cluster")


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One member of a bundle: the name people use and the hash that decides."""

    version: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Eleven frozen versions. Example: bundle.id[:12], bundle.policy.version, bundle.data_snapshot.sha256."""

    base_model: Component
    sft: Component
    reward_model: Component
    policy: Component
    data_snapshot: Component
    eval_suites: Component
    tool_set: Component
    policy_checks: Component
    spec: Component
    code_revision: Component
    seed: Component

    def __post_init__(self) -> None:
        """Refuse a member without a version or with something that is not a sha256."""
        for name, component in self.members.items():
            if not component.version or not _SHA256.fullmatch(component.sha256):
                value = (component.version, component.sha256)
                raise BadInputError(f"bundle.{name}", value, "give a version name and 64 hex digits of sha256")

    @property
    def members(self) -> Mapping[str, Component]:
        """Members by name, in the order of the manifest."""
        return {name: getattr(self, name) for name in MEMBERS}

    @cached_property
    def id(self) -> str:
        """The sha256 of the content: two bundles with one id are the same bundle."""
        return sha256_json(encode(self))

    @property
    def baseline(self) -> Bundle:
        """The bundle of the frozen baseline: the same, but the SFT model is the policy."""
        return replace(self, policy=self.sft)

    def write(self, path: Path) -> None:
        """Write the manifest with its id, atomically. Raises TamperedError over a different bundle."""
        # Compared by id: a resumed run writes the same bundle again, and that is no change.
        written = load_bundle(path) if path.exists() else self
        if written.id != self.id:
            found = diff_bundles(written, self)
            changes = [f"{change.member} was {change.before.version}, is {change.after.version}" for change in found]
            raise TamperedError(
                f"{path} holds another bundle, and a bundle never changes ({'; '.join(changes)}); start a new run"
            )
        write_json(path, {"bundle_id": self.id, **encode(self)})


MEMBERS: Final = tuple(field.name for field in fields(Bundle))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One member that differs between two bundles."""

    member: str
    before: Component
    after: Component


def build_bundle(members: Mapping[str, Component]) -> Bundle:
    """Build a bundle from all its members. Raises BadInputError naming what is missing or unknown."""
    missing = [name for name in MEMBERS if name not in members]
    unknown = sorted(set(members) - set(MEMBERS))
    if missing or unknown:
        remedy = f"a bundle is complete or it is none; missing {missing}, unknown {unknown}"
        raise BadInputError("bundle", sorted(members), remedy)
    return Bundle(**members)


def load_bundle(path: Path) -> Bundle:
    """Read a manifest. Raises BadInputError for an unreadable one, TamperedError when its id is not its content's."""
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stated = manifest.pop("bundle_id")
        bundle = build_bundle({name: Component(**member) for name, member in manifest.items()})
    # Whatever a file can hold instead of a manifest: no JSON, a list, other keys, a member that is no mapping.
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInputError("bundle", str(path), f"is not a bundle manifest ({error!r}); restore it") from error
    if bundle.id != stated:
        raise TamperedError(f"{path}: content hashes to {bundle.id[:12]}, the manifest says {stated[:12]}; restore it")
    return bundle


def diff_bundles(before: Bundle, after: Bundle) -> tuple[Change, ...]:
    """Return the members whose hash differs, in manifest order."""
    # Names are for people: a new name for the same hash is no change.
    pairs = ((name, before.members[name], after.members[name]) for name in MEMBERS)
    return tuple(Change(member=name, before=old, after=new) for name, old, new in pairs if old.sha256 != new.sha256)


def component_of(version_name: str, value: object) -> Component:
    """Return a member whose content is a plain value, such as the seed, a tool list or a suite's hashes."""
    return Component(version=version_name, sha256=sha256_json(encode(value)))


def code_component(root: Path = _ROOT) -> Component:
    """Return the code revision: the hash over every source file of the three packages, as they are on disk now."""
    # Not git's: an installed package has none, and an edited working tree would pass for its last commit.
    # Prompts, schemas and texts decide as much as code does.
    suffixes = {".py", ".yaml", ".sql", ".json", ".j2"}
    files = [path for name in _PACKAGES for path in sorted((root / name).rglob("*")) if path.suffix in suffixes]
    hashes = {path.relative_to(root).as_posix(): sha256_file(path) for path in files if "__pycache__" not in path.parts}
    digest = sha256_json(hashes)
    return Component(version=f"{_package_version()}+{digest[:12]}", sha256=digest)


def _package_version() -> str:
    try:
        return version("seatrial")
    except PackageNotFoundError:
        return "uninstalled"
