"""The check whether the Hugging Face hub answers, for the modules that read data."""

from __future__ import annotations

from train.plan.hub import is_reachable as is_reachable
