"""The types of all configuration keys, so that a mistyped key or value is reported by name.

The classes are plain data. `__post_init__` checks them and raises one sentence with the value, the rule and the remedy.
Nothing here imports torch or transformers, so that `python -m launch` and `python -m launch.plan` start fast.
"""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from conf.schema.compact import CompactConfig
from conf.schema.data import DataConfig
from conf.schema.evaluation import EvalConfig
from conf.schema.law import PredictConfig, ScalingLawConfig
from conf.schema.model import ModelConfig
from conf.schema.output import CardConfig, ExportConfig, LoggerConfig
from conf.schema.pairs import PairsConfig
from conf.schema.plan import PlanConfig
from conf.schema.report import DashboardConfig, ReportConfig
from conf.schema.run import Config, LaunchConfig, tokenizer_of
from conf.schema.sparsity import SparsityConfig, WindowConfig
from conf.schema.trainer import OptimConfig, TrainerConfig

__all__ = [
    "SCHEMAS", "CardConfig", "CompactConfig", "Config", "DashboardConfig", "DataConfig", "EvalConfig", "ExportConfig",
    "LaunchConfig", "LoggerConfig", "ModelConfig", "OptimConfig", "PairsConfig", "PlanConfig", "PredictConfig",
    "ReportConfig", "ScalingLawConfig", "SparsityConfig", "TrainerConfig", "WindowConfig", "register",
    "tokenizer_of",
]  # fmt: skip

SCHEMAS: dict[str, type] = {
    "run": Config,
    "plan": PlanConfig,
    "eval": EvalConfig,
    "compact": CompactConfig,
    "scaling_law": ScalingLawConfig,
    "pairs": PairsConfig,
    "report": ReportConfig,
    "dashboard": DashboardConfig,
}
"""The class of each yaml file at the top of conf/, which includes it as NAME_schema."""


def register() -> None:
    """Register the classes with Hydra."""
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=schema)
