"""Checks before a run starts: the model of `init_from` must fit, and the tokenizer must have that model's token ids."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from conf.schema import Config, tokenizer_of
from train.checkpoints.branch import check_branch
from train.plan.branch import run_folder
from train.plan.run import RunPlan

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def check_start(config: Config, plan: RunPlan, overrides: Sequence[str]) -> None:
    """Check that `init_from` or `branch_from` fits the run, that a tokenizer fits, and what the model can do.

    Only configs, headers and a local tokenizer.json are read.

    A run that has already started is not checked: its weights come from its checkpoints.

    Args:
        config: The run's configuration.
        plan: The run's plan; its model may be that of a dense twin.
        overrides: The command line, which shows what the user set.

    Raises:
        ValueError: Something does not fit; the message names it and the remedy.
    """
    if not config.overwrite and (plan.run_dir / "config.yaml").exists():
        return
    check_tokenizer_size(config, plan.model.vocab_size)
    if plan.model.path is not None and config.data.attention == "document":
        # The import loads torch; a launch of one of our LLaMAs saves that time.
        from train.model.build import transformers_config
        from train.model.documents import check_keeps_documents_apart

        check_keeps_documents_apart(transformers_config(plan.model))
    if config.branch_from is not None:
        if run_folder(config).resolve() == plan.run_dir.resolve():
            raise ValueError(f"branch_from={config.branch_from} is this run's own folder: give another run_name.")
        check_branch(config, plan)
        return
    if config.init_from is None:
        check_tokenizer_of_path(config)
        if plan.model.path is not None:
            from train.model.drawable import check_drawable

            check_drawable(plan.model)
        return
    # The import loads torch; a launch without init_from saves that time.
    from train.model.initial import check_initial_model

    check_initial_model(config.init_from, plan.model)
    check_tokenizer_choice(config, overrides)


def check_tokenizer_choice(config: Config, overrides: Iterable[str]) -> None:
    """Refuse to train a new tokenizer under the embeddings of `init_from`, unless the command line asks for it.

    Raises:
        ValueError: `init_from` has no tokenizer and no other is given, or tokenizer=train was not typed by the user.
    """
    folder = config.init_from
    if folder is None:
        return
    if config.tokenizer is None and not has_tokenizer(folder):
        raise ValueError(
            f"init_from={folder} holds no tokenizer, but its embeddings only fit the ids of the one it was trained with: "
            "give that one, tokenizer=FOLDER_OR_NAME."
        )
    if config.tokenizer == "train" and not is_named("tokenizer", overrides):
        raise ValueError(
            f"tokenizer=train would train a new tokenizer, whose ids do not match the embeddings of init_from={folder}: "
            "set tokenizer=null to use the folder's, or write tokenizer=train on the command line if you mean it."
        )


def check_tokenizer_of_path(config: Config) -> None:
    """Refuse a `model.path` without a tokenizer, unless another one is given.

    Raises:
        ValueError: There is no tokenizer.
    """
    path = config.model.path
    if path is not None and config.tokenizer is None and not has_tokenizer(path):
        raise ValueError(
            f"model.path={path} holds no tokenizer: give one, tokenizer=FOLDER_OR_NAME, or tokenizer=train to train one "
            "of the model's vocabulary size."
        )


def check_tokenizer_size(config: Config, vocab_size: int) -> None:
    """Refuse a tokenizer with more tokens than the model; any other kind than a folder's is checked when it is loaded.

    Raises:
        ValueError: It has more tokens.
    """
    spec = tokenizer_of(config)
    file = Path(spec).expanduser() / "tokenizer.json"
    if not file.is_file():
        return
    from tokenizers import Tokenizer

    from train.data.tokenizer import check_vocabulary

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:
        # A file that cannot be read is reported in a sentence when it is loaded.
        return
    check_vocabulary(tokenizer, vocab_size, spec)


def check_tokenizer(config: Config, overrides: Iterable[str]) -> None:
    """Refuse a tokenizer whose ids differ from those of `init_from`; only warn if the command line asks for it.

    This loads both tokenizers; one process calls it.

    Raises:
        ValueError: The tokenizers differ; the message names both and the remedy.
    """
    check_tokenizer_choice(config, overrides)
    folder, chosen = config.init_from, config.tokenizer
    if folder is None or chosen is None:
        return
    if chosen != "train" and has_tokenizer(folder):
        from train.data import load_tokenizer

        if load_tokenizer(chosen).get_vocab() == load_tokenizer(folder).get_vocab():
            return
    what = "a new one" if chosen == "train" else "another one"
    if chosen != "train" and not has_tokenizer(folder):
        what = "one that cannot be compared"
    if not is_named("tokenizer", overrides):
        raise ValueError(
            f"tokenizer={chosen} is not the tokenizer of init_from={folder}, whose embeddings only fit its own ids: set "
            f"tokenizer=null to use the folder's, or write tokenizer={chosen} on the command line if you mean it."
        )
    print(
        f"warning: tokenizer={chosen} is {what}, not the tokenizer of init_from={folder}: the embeddings were trained for "
        "the folder's ids; leave tokenizer out to use the folder's.",
        file=sys.stderr,
        flush=True,
    )


def has_tokenizer(spec: str) -> bool:
    """Return whether a folder has a tokenizer; True for a hub name, which AutoTokenizer checks later."""
    folder = Path(spec).expanduser()
    return not folder.is_dir() or any((folder / name).is_file() for name in TOKENIZER_FILES)


def is_named(key: str, overrides: Iterable[str]) -> bool:
    """Return whether an override sets `key`."""
    return any(item.lstrip("+").split("=", 1)[0] == key for item in overrides)


def command_line() -> list[str]:
    """Return the overrides that Hydra read in this process; an empty list outside Hydra."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
