"""The whole card: its header, its sections, and those that are mostly fixed words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard

from conf.schema import Config, tokenizer_of
from sparsity.common.files import write_atomically
from sparsity.common.text import count_text, markdown_list, percent_text
from train.plan.run import RunPlan
from train.record.card.figures import figures_section, series_section
from train.record.card.header import card_data
from train.record.card.model import model_section
from train.record.card.training import training_section
from train.record.directory import RunDirectory
from train.record.siblings import Figures, find_siblings, has_sparse_weights, is_sparse
from train.record.terms import (
    BIBTEX,
    PAPER,
    PAPER_URL,
    base_model_terms,
    licence_words,
    public_name,
    source_of,
    tokenizer_terms,
)


def card_text(config: Config, plan: RunPlan, summary: Figures, siblings: Sequence[Figures] = ()) -> str:
    """Return README.md: its yaml header and its Markdown.

    Figures that are not finite are left out of the header and shown as such in the text.

    Args:
        config: The run's configuration.
        plan: The plan made from it.
        summary: The run's figures.
        siblings: Summaries of finished runs of the same series.
    """
    own = {**summary, "run_name": plan.run_dir.name}
    sections = [
        f"# {own['run_name']}\n\n{_opening(config, plan, own)}",
        f"## Model\n\n{model_section(config, plan, own)}",
        f"## Figures\n\n{figures_section(own)}",
        f"## Training\n\n{training_section(config, plan, own, siblings)}",
        f"## Series\n\n{series_section(own, siblings)}",
        f"## Usage\n\n{_usage(config, plan)}",
        f"## Limits\n\n{_limits(own)}",
        f"## Licence and terms\n\n{_terms(config)}",
        f"## Citation\n\nThe method is that of [{PAPER}]({PAPER_URL}); please cite it.\n\n```bibtex\n{BIBTEX}\n```",
    ]
    header = card_data(config, plan, own).to_yaml()
    return str(ModelCard(f"---\n{header}\n---\n\n" + "\n\n".join(sections) + "\n"))


def write_card(config: Config, plan: RunPlan, directory: RunDirectory, summary: Figures) -> None:
    """Write model/README.md. Only rank 0 calls this, before the summary marks the run as finished."""
    siblings = find_siblings(plan.run_dir, Path(config.runs_dir))
    write_atomically(directory.model / "README.md", card_text(config, plan, summary, siblings))


def _opening(config: Config, plan: RunPlan, own: Figures) -> str:
    zeros = f"{percent_text(own['sparsity'])} of the weights in its linear layers are exactly zero"
    outcome = (
        f"pruned during training: {zeros}"
        if is_sparse(own)
        else f"sparse because it kept the zeros of the model it started from: {zeros}"
        if has_sparse_weights(own)
        else "dense: nothing was pruned"
    )
    start = "pre-trained from scratch"
    if config.init_from is not None:
        start = f"trained further from the weights of `{public_name(config.init_from)}`"
    what = "LLaMA" if plan.model.path is None else f"model of the architecture `{plan.architecture}`"
    return (
        f"A {what} of {count_text(own['total_params'])} parameters, {start} and {outcome}. Trained by sparsellm, an "
        f"implementation of [{PAPER.split(':')[0]}]({PAPER_URL}); it is not one of the checkpoints published with the "
        "paper."
    )


def _usage(config: Config, plan: RunPlan) -> str:
    """Return example code that works when pasted; if there is no hub_id, it loads the run's folder.

    Only the end of an absolute path is shown, because a card may be published and the rest of the path is private.
    """
    run_dir, start = plan.run_dir, "the folder that training was started in"
    if run_dir.is_absolute():
        run_dir, start = Path(run_dir.name), "the folder that holds the run's own"
    name = config.card.hub_id or (run_dir / "model").as_posix()
    place = (
        "" if config.card.hub_id else f"`name` is this folder's path from {start}; elsewhere, give its path there.\n\n"
    )
    return f"""{place}```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {json.dumps(name, ensure_ascii=False)}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)

prompt = tokenizer({json.dumps(config.prompt, ensure_ascii=False)}, return_tensors="pt", return_token_type_ids=False)
output = model.generate(**prompt, max_new_tokens={min(50, plan.model.max_position_embeddings // 2)}, do_sample=True)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""


def _limits(own: Figures) -> str:
    words = (
        "A base model for research on scaling: it continues text, was tuned neither to follow instructions nor to be "
        "safe, and repeats what its training data says, mistakes included."
    )
    if has_sparse_weights(own):
        words += (
            " To transformers a zero is a weight like any other: the sparsity saves memory and time only once the "
            "weights are in a sparse format with kernels for it."
        )
    return words


def _terms(config: Config) -> str:
    base = {} if config.init_from is None else {"Model it started from": base_model_terms(config.init_from)}
    return markdown_list(
        {
            "Licence of this model": licence_words(config.card),
            **base,
            "Training data": source_of(config.data).terms,
            "Tokenizer": tokenizer_terms(tokenizer_of(config)),
        }
    )
