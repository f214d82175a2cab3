"""Small pieces of the sentences that people read."""

from __future__ import annotations


def count(number: int, what: str, many: str = "") -> str:
    """`1 flow`, `2,000 flows`; `many`: a plural that is not `what` with an s."""
    return f"{number:,} {what if number == 1 else many or f'{what}s'}"
