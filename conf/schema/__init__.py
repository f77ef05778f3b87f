"""The types behind every configuration key: a mistyped key or value is refused by name.

Plain data, checked in `__post_init__` with one sentence that gives the value, the rule and the remedy. Nothing here
imports torch or transformers: `python -m launch` and `python -m launch.plan` start from these classes alone.
"""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from conf.schema.data import DataConfig
from conf.schema.evaluation import EvalConfig
from conf.schema.law import PredictConfig, ScalingLawConfig
from conf.schema.model import ModelConfig
from conf.schema.output import CardConfig, ExportConfig, LoggerConfig
from conf.schema.plan import PlanConfig
from conf.schema.report import DashboardConfig, ReportConfig
from conf.schema.run import Config, LaunchConfig
from conf.schema.sparsity import SparsityConfig, WindowConfig
from conf.schema.trainer import OptimConfig, TrainerConfig

__all__ = [
    "CardConfig", "Config", "DashboardConfig", "DataConfig", "EvalConfig", "ExportConfig", "LaunchConfig", "LoggerConfig",
    "ModelConfig", "OptimConfig", "PlanConfig", "PredictConfig", "ReportConfig", "ScalingLawConfig", "SparsityConfig",
    "TrainerConfig", "WindowConfig", "register",
]  # fmt: skip


def register() -> None:
    """Make the classes known to Hydra: `run_schema` is a run's, the others those of the command in their name."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=Config)
    store.store(name="eval_schema", node=EvalConfig)
    store.store(name="plan_schema", node=PlanConfig)
    store.store(name="scaling_law_schema", node=ScalingLawConfig)
    store.store(name="report_schema", node=ReportConfig)
    store.store(name="dashboard_schema", node=DashboardConfig)
