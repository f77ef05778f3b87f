"""Publishing the model folder of a finished run: renewing its card, and uploading it to the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from huggingface_hub import ModelCard

from conf.schema import CardConfig, Config
from train.data import hub
from train.plan.run import RunPlan
from train.record.card import write_card
from train.record.directory import RunDirectory
from train.record.siblings import Figures


def renew_card(config: Config, plan: RunPlan, directory: RunDirectory, summary: Figures) -> None:
    """Rewrite a finished run's card if the command gives card.* keys; keep its licence unless a new one is given.

    Args:
        config: The configuration, with the keys of this command.
        plan: The plan made from it.
        directory: The run's folder.
        summary: The run's figures.
    """
    readme = directory.model / "README.md"
    if config.card == CardConfig():
        return
    if config.card.license is None and readme.exists():
        before = ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
        kept = {key: before.get(key) for key in ("license", "license_name", "license_link")}
        config = replace(config, card=replace(config.card, **kept))
    write_card(config, plan, directory, summary)


def push_to_hub(card: CardConfig, model: Path) -> None:
    """Upload the finished model folder if card.push_to_hub is set. Only rank 0 calls this, after the summary is written.

    Raises:
        ValueError: The upload failed; the run is still finished.
    """
    if not card.push_to_hub:
        return
    from huggingface_hub import HfApi

    assert card.hub_id is not None
    try:
        # The remembered answer may be days old: the run may have started when the hub did not answer.
        hub.is_reachable.cache_clear()
        if not hub.is_reachable():
            raise ConnectionError("the hub does not answer")
        api = HfApi()
        api.create_repo(card.hub_id, private=card.private, exist_ok=True)
        api.upload_folder(repo_id=card.hub_id, folder_path=model, commit_message=f"Upload {model.parent.name}")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise ValueError(
            f"the run is finished and {model} is whole, but it was not uploaded to {card.hub_id} ({reason}): start the "
            "same command again, it only uploads."
        ) from None
    print(f"uploaded {model} to https://huggingface.co/{card.hub_id}", flush=True)
