"""Which side of the split a document is on follows from its text alone."""

from __future__ import annotations

from hashlib import blake2b


def is_heldout(text: bytes, heldout_share: float) -> bool:
    """True for about `heldout_share` of all UTF-8 texts, and always the same for equal ones.

    A larger share holds out every document that a smaller one does.
    """
    return int.from_bytes(blake2b(text, digest_size=8).digest()) < heldout_share * 2**64
