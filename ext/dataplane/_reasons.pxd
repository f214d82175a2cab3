# The closed list of reasons, as the compiled engine sees it. `dataplane/reasons.py` says what each
# means; tests/unit/test_reasons.py holds the two lists together.
cdef enum reason_t:
    R_NONE = 0
    R_POLICY_RULE = 1
    R_NO_RULE = 2
    R_NOT_ISOLATED = 3
    R_REPLY = 4
    R_RELATED = 5
    R_SAME_POD = 6
    R_OWN_NODE = 7
    R_NEIGHBOUR_DISCOVERY = 8
    R_NOT_A_POD = 9
    R_SPOOFED = 10
    R_MALFORMED = 11
    R_FRAGMENT = 12
    R_INVALID = 13
    R_NO_TABLE = 14
    R_QUEUE_FULL = 15
    R_FAIL_OPEN = 16
    R_AUDIT = 17
    R_HOOK = 18
    R_COUNT = 19
