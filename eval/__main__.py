"""A model folder's figures: `python -m eval model=runs/demo/model data=pydocs [format=json]`."""

import contextlib
import json
import sys

import hydra
from omegaconf import DictConfig

from conf import cli, schema
from conf.compose import check_arguments

schema.register()


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="eval")
def main(cfg: DictConfig) -> None:
    # Standard output is for the figures alone, so that a script can read them.
    with cli.user_errors(), contextlib.redirect_stdout(sys.stderr):
        config = cli.typed(cfg)
        from eval.perplexity import evaluate
        from eval.text import figures_text

        figures = evaluate(config)
    print(json.dumps(figures, indent=2) if config.format == "json" else figures_text(figures))


def folder_named_model(argument: str) -> str:
    """Hydra would look for the value of model= among the configs in conf/model."""
    return f"folder={argument.removeprefix('model=')}" if argument.startswith("model=") else argument


if __name__ == "__main__":
    sys.argv[1:] = map(folder_named_model, sys.argv[1:])
    with cli.user_errors():
        check_arguments("eval", sys.argv[1:])
    main()
