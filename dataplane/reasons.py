"""Why a packet was allowed or denied: the closed list every verdict carries.

The numbers are part of the compiled engine (`ext/dataplane/_reasons.pxd` repeats them, a test
holds both together); the words are what operators see in logs, metrics, traces and `explain`.
"""

from __future__ import annotations

import enum


class Reason(enum.IntEnum):
    """One value per way a packet can get its verdict."""

    NONE = 0  # never shown: "this end was not looked at"
    POLICY_RULE = 1  # a rule of a policy that selects the pod matched
    NO_RULE = 2  # the pod is isolated in this direction and no rule matched
    NOT_ISOLATED = 3  # no policy isolates the pod in this direction
    REPLY = 4  # the other direction of a flow that is allowed
    RELATED = 5  # an ICMP error about a flow that is allowed
    SAME_POD = 6  # a pod talks to its own address
    OWN_NODE = 7  # between a pod and the node it runs on
    NEIGHBOUR_DISCOVERY = 8  # ARP, IPv6 ND and MLD, which keep the link alive
    NOT_A_POD = 9  # this end is no pod of this node
    SPOOFED = 10  # the source is not an address of the pod that sent the packet
    MALFORMED = 11  # cannot be parsed
    FRAGMENT = 12  # a later fragment without its first
    INVALID = 13  # conntrack calls it invalid
    NO_TABLE = 14  # no rules have been compiled yet
    QUEUE_FULL = 15  # the kernel had no room to queue it
    FAIL_OPEN = 16  # let through unjudged, because the operator chose --fail open
    AUDIT = 17  # would have been denied, but only an audit is running
    HOOK = 18  # a user's hook decided

    @property
    def text(self) -> str:
        """The word operators see, e.g. ``no-rule``."""
        return self.name.lower().replace("_", "-")


BY_TEXT = {reason.text: reason for reason in Reason if reason is not Reason.NONE}
