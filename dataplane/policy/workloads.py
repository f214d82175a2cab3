"""Which labels name a pod's workload, and outlive its next roll-out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from dataplane.model import Key, LabelSelector, Operator, Pod

# What names a workload, most telling first; other labels follow by name.
_TELLING = (
    "app.kubernetes.io/name",
    "app.kubernetes.io/component",
    "app.kubernetes.io/instance",
    "app",
    "k8s-app",
    "name",
    "component",
    "tier",
    "role",
    "app.kubernetes.io/part-of",
)
# What controllers and package managers write anew for each pod, roll-out or release.
_PASSING = frozenset(
    {
        "pod-template-hash",
        "pod-template-generation",
        "controller-revision-hash",
        "statefulset.kubernetes.io/pod-name",
        "apps.kubernetes.io/pod-index",
        "batch.kubernetes.io/job-name",
        "batch.kubernetes.io/controller-uid",
        "batch.kubernetes.io/job-completion-index",
        "job-name",
        "controller-uid",
        "app.kubernetes.io/version",
        "helm.sh/chart",
        "chart",
    }
)
_NAME_LENGTH = 63  # longer ones are valid, but nobody reads them


class Workloads:
    """The selectors of live pods' workloads."""

    def __init__(self, pods: Sequence[Pod]) -> None:
        self.live = {pod.key: pod for pod in pods if not pod.finished}
        self.by_namespace: defaultdict[str, list[Pod]] = defaultdict(list)
        for pod in self.live.values():
            self.by_namespace[pod.key.namespace].append(pod)
        self._labels: dict[Key, Mapping[str, str]] = {}

    def selector_of(self, pod: Pod, comments: list[str]) -> LabelSelector:
        """Those of a pod's lasting labels that it takes to select as few pods of its namespace as all do."""
        if pod.key not in self._labels:
            lasting = {key: value for key, value in pod.labels.items() if key not in _PASSING}
            self._labels[pod.key] = self._fewest(pod, lasting or pod.labels)
        labels = self._labels[pod.key]
        if labels and _PASSING.issuperset(labels):
            comments.append(
                f"{pod.key} has no label that outlives a roll-out: give it one, and use that here"
            )
        return LabelSelector.of(labels)

    def _fewest(self, pod: Pod, labels: Mapping[str, str]) -> Mapping[str, str]:
        ranked = sorted(
            labels, key=lambda key: (_TELLING.index(key) if key in _TELLING else len(_TELLING), key)
        )
        left = self.by_namespace[pod.key.namespace]
        chosen: dict[str, str] = {}
        for key in ranked:
            fewer = [each for each in left if each.labels.get(key) == labels[key]]
            # The first is taken in any case: without one the selector would select pods yet to come.
            if not chosen or len(fewer) < len(left):
                chosen[key] = labels[key]
                left = fewer
        return chosen


def word_of(selector: LabelSelector) -> str:
    """A word for what a selector selects: the value of its most telling label."""
    values = {each.key: each.values[0] for each in selector.requirements if each.operator is Operator.IN}
    return next((values[key] for key in _TELLING if values.get(key)), "")


def unused_name(namespace: str, wanted: str, taken: Collection[Key]) -> Key:
    """A valid object name as near to `wanted` as it gets, with a number where that is taken."""
    base = re.sub(r"[^a-z0-9]+", "-", wanted.lower())[:_NAME_LENGTH].strip("-")
    key, number = Key(namespace, base), 1
    while key in taken:
        number += 1
        key = Key(namespace, f"{base[: _NAME_LENGTH - len(str(number)) - 1].rstrip('-')}-{number}")
    return key
