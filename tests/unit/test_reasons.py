"""The two lists of reasons, Python's and the compiled engine's, are one."""

from __future__ import annotations

import re
from pathlib import Path

from dataplane.reasons import BY_TEXT, Reason

PXD = Path(__file__).parents[2] / "ext" / "dataplane" / "_reasons.pxd"


def test_compiled_reasons_are_the_same() -> None:
    compiled = {name: int(value) for name, value in re.findall(r"^\s+R_(\w+) = (\d+)", PXD.read_text(), re.M)}
    assert compiled.pop("COUNT") == len(Reason)
    assert compiled == {reason.name: reason.value for reason in Reason}


def test_reasons_are_numbered_without_gaps() -> None:
    """The engine's counters are arrays over them."""
    assert [reason.value for reason in Reason] == list(range(len(Reason)))


def test_texts_are_words_and_lead_back() -> None:
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", text) for text in BY_TEXT)
    assert {BY_TEXT[reason.text] for reason in Reason if reason} == set(Reason) - {Reason.NONE}
