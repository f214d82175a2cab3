"""The PolicyEndpoints that are there: ours by policy, and whether somebody else's are among them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from dataplane.controller import objects
from dataplane.controller.objects import Raw
from dataplane.controller.slices import Found
from dataplane.model import Key


class Inventory:
    """Receives a watch's PolicyEndpoints, and what our own requests answer, whichever comes first."""

    def __init__(self, on_change: Callable[[Key], None], on_foreign: Callable[[], None]) -> None:
        """`on_change` is called with a policy whose objects somebody else has changed; `on_foreign`, when
        the first of somebody else's objects comes or the last one goes."""
        self._on_change = on_change
        self._on_foreign = on_foreign
        self._found: dict[Key, Found] = {}
        self._by_policy: defaultdict[Key, dict[Key, Found]] = defaultdict(dict)
        self._foreign: set[str] = set()
        self._told = False  # that there are any
        self._listing: dict[Key, Found] | None = None
        self._listed_foreign: set[str] = set()
        self._written: set[Key] = set()  # since the list began that is under way

    @property
    def foreign(self) -> str | None:
        """Who else's objects there are, for people."""
        if not self._foreign:
            return None
        return f"PolicyEndpoint {min(self._foreign)}{' and others' if len(self._foreign) > 1 else ''}"

    @property
    def policies(self) -> set[Key]:
        """Of which there are objects of ours."""
        return set(self._by_policy)

    def of(self, policy: Key) -> list[Found]:
        """The objects of ours that belong to a policy."""
        return list(self._by_policy.get(policy, {}).values())

    def __len__(self) -> int:
        return len(self._found)

    # --- what our requests answer -----------------------------------------------------------------------

    def wrote(self, namespace: str, found: Found) -> None:
        """An object as we have just written it."""
        self._written.add(Key(namespace, found.name))
        self._put(Key(namespace, found.name), found)

    def removed(self, namespace: str, name: str) -> None:
        """An object that is gone."""
        self._drop(Key(namespace, name))

    # --- what the watch tells ----------------------------------------------------------------------------

    def begin_list(self) -> None:
        self._listing = {}
        self._listed_foreign = set()
        self._written = set()

    def listed(self, raw: Raw) -> None:
        assert self._listing is not None
        if not objects.is_ours(raw):
            self._listed_foreign.add(objects.describe(raw))
            return
        key = _key(raw)
        known = self._found.get(key)
        self._listing[key] = known if known is not None and not _is_news(known, raw) else objects.read(raw)

    def unlisted(self, raw: Raw) -> None:
        assert self._listing is not None
        self._listing.pop(_key(raw), None)
        self._listed_foreign.discard(objects.describe(raw))

    def end_list(self) -> None:
        listing, self._listing = self._listing or {}, None
        before = dict(self._found)
        for key in before.keys() - listing.keys() - self._written:
            self._drop(key)
        for key, found in listing.items():
            if key not in self._written:
                self._put(key, found)
        changed = {
            found.slice.head.policy
            for key in before.keys() | self._found.keys()
            if before.get(key) is not self._found.get(key)
            for found in (before.get(key), self._found.get(key))
            if found is not None
        }
        self._foreign, self._listed_foreign = self._listed_foreign, set()
        self._tell()
        for policy in sorted(changed):
            self._on_change(policy)

    def changed(self, raw: Raw) -> None:
        key = _key(raw)
        if not objects.is_ours(raw):
            self._drop(key)  # or somebody has taken our label away, and the object with it
            self._foreign.add(objects.describe(raw))
            self._tell()
            return
        self._not_foreign(raw)
        known = self._found.get(key)
        if known is not None and not _is_news(known, raw):
            return  # our own write's echo
        found = objects.read(raw)
        self._put(key, found)
        for policy in {each.slice.head.policy for each in (known, found) if each is not None}:
            self._on_change(policy)

    def gone(self, raw: Raw) -> None:
        self._not_foreign(raw)
        key = _key(raw)
        known = self._found.get(key)
        if known is not None:
            self._drop(key)
            self._on_change(known.slice.head.policy)

    def _not_foreign(self, raw: Raw) -> None:
        self._foreign.discard(objects.describe(raw))
        self._tell()

    def _tell(self) -> None:
        if bool(self._foreign) != self._told:
            self._told = bool(self._foreign)
            self._on_foreign()

    def _put(self, key: Key, found: Found) -> None:
        self._drop(key)
        self._found[key] = found
        self._by_policy[found.slice.head.policy][key] = found

    def _drop(self, key: Key) -> None:
        known = self._found.pop(key, None)
        if known is not None:
            policy = known.slice.head.policy
            del self._by_policy[policy][key]
            if not self._by_policy[policy]:
                del self._by_policy[policy]


def _key(raw: Raw) -> Key:
    metadata = raw["metadata"]
    return Key(str(metadata.get("namespace")), str(metadata.get("name")))


def _is_news(known: Found, raw: Raw) -> bool:
    """Whether an object is another version than the one we know, and not an older one.

    Versions are decimal numbers that grow, as etcd counts them.
    """
    metadata = raw["metadata"]
    version = str(metadata.get("resourceVersion"))
    if str(metadata.get("uid")) != known.uid or not (version.isdecimal() and known.version.isdecimal()):
        return version != known.version
    return int(version) > int(known.version)
