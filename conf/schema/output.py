"""The groups for the output of a run: its records, the model folder, and the model card."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from conf.schema.checks import check, check_choice


@dataclass
class LoggerConfig:
    """Settings of wandb, by the names of `wandb.init`; metrics.jsonl is always written."""

    wandb: bool = True
    """Record the run in wandb too."""
    mode: str = "auto"
    """`auto` is online if an API key is configured, else offline."""
    project: str = "sparsellm"
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_choice("logger.mode", self.mode, ("auto", "online", "offline"))


@dataclass
class ExportConfig:
    """The final model folder."""

    dtype: str = "float32"
    """Type of the weights in the model folder: float32 or bfloat16."""
    max_shard_size: str = "5GB"
    """Largest size of a file of weights."""

    def __post_init__(self) -> None:
        check_choice("export.dtype", self.dtype, ("float32", "bfloat16"))
        check(
            re.fullmatch(r"[1-9]\d*(?:[KMGT]i?B)?", self.max_shard_size) is not None,
            f"export.max_shard_size={self.max_shard_size} is not a file size: give one like 5GB.",
        )


@dataclass
class CardConfig:
    """The model's card, and the hub repository that the finished model may be uploaded to.

    If a finished run is started again with any of these keys, it rewrites its card and does not train.
    """

    license: str | None = None
    """The hub's identifier of the model's licence, such as apache-2.0; if null, the card says that none was chosen."""
    license_name: str | None = None
    """The name of the licence if `license` is other."""
    license_link: str | None = None
    """A link to the licence if `license` is other."""
    hub_id: str | None = None
    """OWNER/NAME on the hub: the target of an upload, and the name that the card's usage code loads."""
    push_to_hub: bool = False
    """Upload the finished model folder to `hub_id`, with the account that `hf auth login` or HF_TOKEN names."""
    private: bool = True
    """Create the repository so that only its owner can see it."""

    def __post_init__(self) -> None:
        check(
            self.license is None or re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license) is not None,
            f"card.license={self.license} is not a licence identifier of the hub: give one like apache-2.0 or mit, or "
            "other with card.license_name.",
        )
        check(
            self.license == "other" or (self.license_name is None and self.license_link is None),
            f"card.license_name={self.license_name} and card.license_link={self.license_link} belong to a licence of "
            "your own: set card.license=other, or leave them null.",
        )
        check(
            self.license != "other" or self.license_name is not None,
            "card.license=other needs card.license_name: the name of the licence.",
        )
        check(
            self.hub_id is None or re.fullmatch(r"[\w.-]+/[\w.-]+", self.hub_id) is not None,
            f"card.hub_id={self.hub_id} is not a repository of the hub: give OWNER/NAME.",
        )
        check(
            not self.push_to_hub or self.hub_id is not None,
            "card.push_to_hub=true needs card.hub_id: the OWNER/NAME on the hub to upload to.",
        )
