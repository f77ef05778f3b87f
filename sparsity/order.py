"""The order of a Trainer's callbacks: the one that keeps pruned weights at 0 must act after all others."""

from __future__ import annotations

import sys
from types import FrameType

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler


def move_to_the_end(callback: TrainerCallback) -> bool:
    """Move `callback` to the end of the callbacks of the Trainer that is calling it.

    A callback gets no reference to its Trainer, so the handler is searched for in the stack of callers.

    Returns:
        Whether a handler with this callback was found.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and any(other is callback for other in handler.callbacks):
            # A new list, because the handler is iterating over the old one.
            handler.callbacks = [*(other for other in handler.callbacks if other is not callback), callback]
            return True
        frame = frame.f_back
    return False
