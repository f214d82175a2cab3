"""What differs between one list of frozen objects and the next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress, count
from operator import is_not
from typing import TypeVar

_T = TypeVar("_T")


def differences(old: Sequence[_T], new: Sequence[_T]) -> tuple[list[_T], list[_T]]:
    """The objects of `old` that `new` lacks, and those of `new` that `old` lacks; both keep their order.

    Objects are compared by identity: who makes the lists gives what stayed as the same object. A changed
    object is in both answers, old version and new.
    """
    # Lists are long, changes short and, in sorted lists, mostly in one place: equal ends cost a
    # pointer comparison per object, only what lies between them is looked at further.
    shorter = min(len(old), len(new))
    start = next(compress(count(), map(is_not, old, new)), shorter)
    end = next(compress(count(), map(is_not, reversed(old), reversed(new))), shorter)
    end = min(end, shorter - start)
    before, after = old[start : len(old) - end], new[start : len(new) - end]
    old_ids, new_ids = set(map(id, before)), set(map(id, after))
    return (
        [each for each in before if id(each) not in new_ids],
        [each for each in after if id(each) not in old_ids],
    )
