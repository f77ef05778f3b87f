"""The command that evaluates a model: `python -m eval model=DIR data=wikitext data.path=FILE [tokenizer=...] [format=json]`.

Under `accelerate launch --config_file launch/accelerate/cpu.yaml -m eval ...` the processes share the model and the text.
"""

import contextlib
import json
import os
import sys

import hydra
from omegaconf import DictConfig

from conf import cli, schema
from conf.compose import check_arguments, prepared
from eval.model.series import with_series_defaults
from train.faults.process import die_with_parent, end_process_after

COLLECTIVES_TIMEOUT_S = 1800
EXAMPLES = """python -m eval model=DIR data=wikitext data.path=wiki.test.raw      perplexity four ways, bits per byte, zeros
python -m eval model=DIR data=pydocs                                  a run's own held-out figures
python -m eval model=DIR tasks=[hellaswag]                            tasks of lm-evaluation-harness
python -m eval series=sparsellm-1b-60p                                a published checkpoint beside its card and our plan
    ... tokenizer=FOLDER dtype=bfloat16 window=2048 stride=512 batch_size=8
    ... format=json                                                   the figures for a script
accelerate launch --config_file launch/accelerate/gpus.yaml -m eval ...  a model that one GPU cannot hold
Keys: conf/eval.yaml, EvalConfig in conf/schema/evaluation.py."""

schema.register()


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="eval")
def main(cfg: DictConfig) -> None:
    is_main = os.environ.get("RANK", "0") == "0"
    # Only the figures go to standard output, so that a script can read them.
    with contextlib.redirect_stdout(sys.stderr):
        with cli.user_errors(quiet=not is_main):
            config = cli.typed(cfg)
        import torch

        from eval.model.load import pick_device
        from eval.model.perplexity import evaluate, finite
        from eval.model.series import check_published, compare_with_card, planned_zeros, series_text
        from eval.model.text import figures_text
        from train.distributed import World, join_world

        with cli.user_errors(quiet=not is_main):
            alone = World(0, 1, torch.device("cpu"))
            world = join_world(COLLECTIVES_TIMEOUT_S) if "WORLD_SIZE" in os.environ else alone
            if world.size == 1:
                world = World(0, 1, pick_device(config.device, world), world.control)
            else:
                pick_device(config.device, world)
        cli.speak()
        if config.series:
            world.on_main(check_published, config)
        figures = evaluate(config, world)
    if is_main:
        words = figures_text(figures) if config.format == "text" else ""
        if config.series:
            found = compare_with_card(config.series, figures, planned_zeros(config.series))
            words += f"\n\n{series_text(found, figures)}"
            figures = {**figures, "series": found}
        print(json.dumps(finite(figures), indent=2) if config.format == "json" else words)
    world.leave()


def run_process() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        cli.overrides_of("eval", "Score a finished model on text.", EXAMPLES, ["--help"])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    cli.hush_other_ranks()
    with cli.user_errors():
        sys.argv[1:] = prepared("eval", with_series_defaults(sys.argv[1:]))
        check_arguments("eval", sys.argv[1:])
    main()


if __name__ == "__main__":
    end_process_after(run_process)
