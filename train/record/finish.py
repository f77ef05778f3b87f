"""The last work of a run, on rank 0: sample, figure, card, and the summary that marks it as finished."""

from __future__ import annotations

import json
import sys
from typing import Any

from conf.schema import Config
from sparsity.common.files import write_atomically
from train.plan.run import RunPlan
from train.record.card import write_card
from train.record.directory import RunDirectory
from train.record.figure import draw_report
from train.record.metrics import Recorder
from train.record.read import read_records
from train.record.text import closing_words, write_sample


def finish(config: Config, plan: RunPlan, directory: RunDirectory, recorder: Recorder, summary: dict[str, Any]) -> None:
    """Write sample, figure and card, and then the summary, which marks the run as finished.

    Only rank 0 calls this.

    Args:
        config: The run's configuration.
        plan: The plan made from it.
        directory: The run's folder.
        recorder: The run's records, which are closed.
        summary: The run's figures.

    Raises:
        OSError: The disk has no room; the run is not finished, and the same command resumes it.
    """
    recorder.finish(summary)
    extras = {
        "sample": lambda: write_sample(directory.model, config.prompt, directory.sample),
        "report": lambda: draw_report(read_records(directory.metrics), summary, directory.report),
        "model card": lambda: write_card(config, plan, directory, summary),
    }
    for name, make in extras.items():
        try:
            make()
        except OSError:
            # The disk is full: the run is not finished, and the same command resumes it.
            raise
        except Exception as error:
            # A diverged model cannot write a sample, and its losses cannot be drawn, but its figures must still be
            # saved.
            print(f"warning: the {name} could not be made: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    write_atomically(directory.summary, json.dumps(summary, indent=2) + "\n")
    print(closing_words(summary, directory, config.next_commands), flush=True)
