"""The command that shows runs side by side: `python -m eval.report runs=runs/SWEEP` writes an HTML page and its PNGs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from conf.cli import overrides_of, user_errors
from conf.compose import composed
from conf.schema import ReportConfig

EXAMPLES = """python -m eval.report runs=runs/SWEEP                           report.html, and its figures in report/
python -m eval.report runs=[runs/a,runs/b*] page=levels.html title="Five levels"
    ... loss=final_train_loss                                   against average parameters, instead of heldout_loss
    ... form=n                                                  the law, as for python -m eval.scaling_law; auto tries all
The page is one file that opens from disk. Runs that are not finished are shown with what they have. Keys:
conf/report.yaml, ReportConfig in conf/schema/report.py."""


def main(arguments: Sequence[str]) -> None:
    with user_errors():
        overrides = overrides_of("eval.report", "Show runs side by side on one HTML page.", EXAMPLES, arguments)
        config: ReportConfig = composed("report", overrides)
        from eval.runs.page.page import write_page
        from eval.runs.run import read_runs

        page = Path(config.page)
        write_page(config, read_runs(config.runs), page)
        print(f"wrote {page} and {page.with_suffix('')}/*.png")


if __name__ == "__main__":
    main(sys.argv[1:])
