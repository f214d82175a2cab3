"""FILTER of `podgate trace`: whatever is written is read, or refused in one line."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dataplane.errors import InputError
from dataplane.observe.selection import FIELDS, Selection
from dataplane.reasons import BY_TEXT

NAMES = st.text("abz09-.*?", min_size=1, max_size=6)
PODS = st.builds("{}/{}".format, NAMES, NAMES)
VALUES = {
    "verdict": st.sampled_from(["allow", "deny"]),
    "reason": st.sampled_from(sorted(BY_TEXT)),
    "direction": st.sampled_from(["ingress", "egress"]),
    "namespace": NAMES,
    "from": PODS | st.sampled_from(["10.0.0.1", "fd00::1"]),
    "to": PODS | st.sampled_from(["10.0.0.1", "fd00::1"]),
    "pod": PODS,
    "policy": PODS,
}
CONDITIONS = st.sampled_from(sorted(FIELDS)).flatmap(
    lambda field: st.builds(
        lambda operator, values: f"{field}{operator}{','.join(values)}",
        st.sampled_from(["=", "!="]),
        st.lists(VALUES[field], min_size=1, max_size=3),
    )
)
PACKETS = st.sampled_from(
    ["tcp", "udp port 53", "host 10.0.0.1 or ip6", "not tcp", "len = 100", "and", "tcp or"]
)
PIECES = st.one_of(
    CONDITIONS,
    PACKETS,
    st.sampled_from(["and", "or", "not", "&&", "(", ")", "=", "!=", "pod=", "verdict==deny", "len=1"]),
    st.text(max_size=12),
)


def refusal(words: list[str]) -> str | None:
    """What is said against these words; None when they are read."""
    try:
        Selection.parse(words)
    except InputError as error:
        return str(error)
    return None


@given(st.lists(PIECES, max_size=8))
def test_anything_is_read_or_refused_and_reads_the_same_again(words: list[str]) -> None:
    said = refusal(words)
    if said is not None:
        assert "\n" not in said
        assert len(said) < 500
        return
    selection = Selection.parse(words)
    again = Selection.parse([str(selection)])
    assert again.conditions == selection.conditions
    assert " ".join(again.packets.split()) == " ".join(selection.packets.split())


@given(st.lists(CONDITIONS, max_size=8), st.permutations(["udp port 53", "host 10.0.0.1 or ip6"]))
def test_everything_well_formed_is_read(conditions: list[str], packets: list[str]) -> None:
    selection = Selection.parse([packets[0], *conditions, packets[1]])
    assert [str(one) for one in selection.conditions] == conditions
    assert selection.compile() is not None
    assert selection.wanted(dict, selection.compile()) is not None
    selection.first_filter(None)


@given(st.text(max_size=40))
def test_pcap_filter_takes_it_or_says_why_in_one_line(text: str) -> None:
    # Words that are looked up as host names would ask name servers: only signs and digits.
    selection = Selection.parse(["".join(one for one in text if not one.isalpha())])
    try:
        selection.compile()
        said = ""
    except InputError as error:
        said = str(error)
    assert "\n" not in said
