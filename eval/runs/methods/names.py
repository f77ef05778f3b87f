"""A run's way to prune in words: the choice of `sparsity=` that it is closest to, and the settings in which it differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

from conf.schema import SparsityConfig
from eval.runs.trials import differing, flat

GROUP, TARGET = "sparsity.", "sparsity.target"
DENSE = "dense"


def method_names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a name for each run's settings by dotted key, such as "rigl", or "geometric, normalize=l2".

    Settings outside the group `sparsity` are named only if they differ among the runs, the target if it does among sparse
    ones.
    """
    targets = {one.get(TARGET) for one in settings if one.get(TARGET)}
    named = [key for key in differing(settings) if not key.startswith(GROUP)]
    if len(targets) > 1:
        named = [TARGET, *named]
    return [_name(one, named) for one in settings]


def _name(settings: Mapping[str, Any], named: Sequence[str]) -> str:
    if not settings.get(TARGET):
        others = [key for key in named if not key.startswith(GROUP)]
        return ", ".join([DENSE, *(f"{key}={settings.get(key)}" for key in others)])
    own = {key: value for key, value in settings.items() if key.startswith(GROUP) and key != TARGET}
    group, different = min(
        ((name, [key for key in own if own[key] != usual.get(key)]) for name, usual in groups().items()),
        key=lambda found: len(found[1]),
    )
    words = [f"{key.removeprefix(GROUP)}={settings.get(key)}" for key in (*different, *named)]
    return ", ".join([group, *words])


@cache
def groups() -> dict[str, dict[str, Any]]:
    """Return the settings of each file of conf/sparsity but dense, by dotted key, the default first."""
    found = {}
    listed = files("conf").joinpath("sparsity").iterdir()
    for file in sorted(listed, key=lambda file: (file.name != "geometric.yaml", file.name)):
        name = file.name.removesuffix(".yaml")
        if name != DENSE and file.name.endswith(".yaml"):
            merged = OmegaConf.merge(OmegaConf.structured(SparsityConfig), OmegaConf.create(file.read_text("utf-8")))
            config: Any = OmegaConf.to_object(merged)
            found[name] = dict(flat(asdict(config), GROUP))
    return found
