"""The split of documents into training and held-out, which depends only on their text."""

from __future__ import annotations

from hashlib import blake2b


def is_heldout(text: bytes, heldout_share: float) -> bool:
    """Return True for about `heldout_share` of all UTF-8 texts, and always the same for equal texts.

    A larger share holds out every document that a smaller one does.
    """
    return int.from_bytes(blake2b(text, digest_size=8).digest()) < heldout_share * 2**64
