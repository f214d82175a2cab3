"""Label selectors: what they match, and which objects they find without looking at each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from dataplane.model import Key, LabelSelector, Operator, Requirement


def matches(selector: LabelSelector, labels: Mapping[str, str]) -> bool:
    """Whether every requirement holds. NotIn and DoesNotExist hold for a label that is missing."""
    for key, operator, values in selector.requirements:
        value = labels.get(key)
        match operator:
            case Operator.IN:
                if value is None or value not in values:
                    return False
            case Operator.NOT_IN:
                if value is not None and value in values:
                    return False
            case Operator.EXISTS:
                if value is None:
                    return False
            case Operator.DOES_NOT_EXIST:
                if value is not None:
                    return False
    return True


def narrowest(selector: LabelSelector) -> Requirement | None:
    """The requirement that few objects are likely to meet: the In with the fewest values, if any."""
    required = [each for each in selector.requirements if each.operator is Operator.IN]
    return min(required, key=lambda each: len(each.values), default=None)


class Labelled(Protocol):
    """What an index can hold."""

    @property
    def key(self) -> Key: ...
    @property
    def labels(self) -> Mapping[str, str]: ...


_T = TypeVar("_T", bound=Labelled)


class LabelIndex(Generic[_T]):
    """Namespaced objects, found by namespace and label: a selector looks only at what may match it."""

    def __init__(self) -> None:
        self._by_namespace: defaultdict[str, dict[Key, _T]] = defaultdict(dict)
        self._by_label: defaultdict[tuple[str, str, str], dict[Key, _T]] = defaultdict(dict)

    def add(self, item: _T) -> None:
        """Take in `item`. One of the same key must have been removed."""
        namespace = item.key.namespace
        self._by_namespace[namespace][item.key] = item
        for name, value in item.labels.items():
            self._by_label[namespace, name, value][item.key] = item

    def remove(self, item: _T) -> None:
        """Forget `item`, which must be what was added."""
        namespace = item.key.namespace
        del self._by_namespace[namespace][item.key]
        for name, value in item.labels.items():
            held = self._by_label[namespace, name, value]
            del held[item.key]
            if not held:
                del self._by_label[namespace, name, value]

    def select(self, namespaces: Collection[str], selector: LabelSelector) -> Iterator[_T]:
        """What `selector` matches in `namespaces`, in no particular order."""
        required = narrowest(selector)
        # With one requirement of that kind, being found by it is all there is to match.
        settled = len(selector.requirements) == (required is not None)
        for namespace in namespaces:
            if required is None:
                groups = [self._by_namespace.get(namespace)]
            else:
                groups = [self._by_label.get((namespace, required.key, value)) for value in required.values]
            for group in groups:
                if group:
                    for item in group.values():
                        if settled or matches(selector, item.labels):
                            yield item
