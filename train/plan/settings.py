"""A run's settings as plain data, in which a null has been replaced by what it stands for, so that runs can be compared."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from conf.schema import Config


def plain_settings(config: Any) -> dict[str, Any]:
    """Return the settings of a run, also of one that an earlier version began; a key that was added since has its default.

    Args:
        config: A Config, or the content of a config.yaml.
    """
    plain: Any = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(Config), config))
    # A run saves which of these it used.
    plain["tokenizer"] = plain["tokenizer"] or plain["init_from"] or plain["model"]["path"] or "train"
    for source in (*plain["data"]["sources"], *plain["eval"]["sets"]):
        # Earlier versions saved "text" where this one saves null.
        source["field"] = source["field"] or plain["data"]["text_field"]
    return {str(key): value for key, value in plain.items()}
