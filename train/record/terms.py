"""The credits and terms of a model: the paper to cite, and the licences of its text, its tokenizer and itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from conf.schema import CardConfig, DataConfig

PAPER = "The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense Scaling Laws"
PAPER_URL = "https://arxiv.org/abs/2501.12486"
BIBTEX = f"""@inproceedings{{jin2025the,
  title     = {{{PAPER}}},
  author    = {{Tian Jin and Ahmed Imtiaz Humayun and Utku Evci and Suvinay Subramanian and Amir Yazdanbakhsh and Dan
               Alistarh and Gintare Karolina Dziugaite}},
  booktitle = {{The Thirteenth International Conference on Learning Representations}},
  year      = {{2025}}
}}"""
LLAMA_2_LICENSE_URL = "https://ai.meta.com/llama/license/"


@dataclass(frozen=True)
class Source:
    """A description of a `data.source`; `hub_id` and `language` are set if the hub has names for them."""

    name: str
    terms: str
    hub_id: str | None = None
    language: str | None = None


LICENCES = {
    "allenai/c4": "[C4](https://huggingface.co/datasets/allenai/c4) is under ODC-By 1.0; its use is also subject to "
    "[CommonCrawl's terms](https://commoncrawl.org/terms-of-use).",
    "HuggingFaceFW/fineweb": "[FineWeb](https://huggingface.co/datasets/HuggingFaceFW/fineweb) is under ODC-By 1.0; its use is "
    "also subject to [CommonCrawl's terms](https://commoncrawl.org/terms-of-use).",
}


def source_of(data: DataConfig) -> Source:
    """Return a description of a run's data."""
    if data.source == "mixture":
        names = [one.hub if one.hub is not None else one.stem for one in data.sources]
        terms = " ".join(_hub_terms(one.hub) for one in data.sources if one.hub is not None)
        return Source(f"a mixture of {', '.join(names)}", f"{terms} {SOURCES['text'].terms}".strip())
    if data.source == "hub":
        name = str(data.name)
        if Path(name).expanduser().is_dir():
            return Source(Path(name).name, SOURCES["text"].terms)
        return Source(f"`{name}` of the hub", _hub_terms(name), hub_id=name)
    return SOURCES[data.source]


def _hub_terms(name: str) -> str:
    return LICENCES.get(
        name, f"[{name}](https://huggingface.co/datasets/{name}) is under the terms that its page on the hub states."
    )


SOURCES = {
    "pydocs": Source(
        "docstrings of the Python standard library and of the packages installed on the training machine",
        "Docstrings of installed packages: each package's are under that package's own licence, the standard library's "
        "under Python's (PSF).",
        language="en",
    ),
    "fineweb_edu": Source(
        "FineWeb-Edu",
        "[FineWeb-Edu](https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu) is under the Open Data Commons "
        "Attribution License, [ODC-By 1.0](https://opendatacommons.org/licenses/by/1-0/); its use is also subject to "
        "[CommonCrawl's terms](https://commoncrawl.org/terms-of-use).",
        hub_id="HuggingFaceFW/fineweb-edu",
        language="en",
    ),
    "tokens": Source(
        "text that whoever trained the model had tokenized",
        "The tokens were supplied by whoever trained the model, and their terms are theirs to state; this card knows none.",
    ),
    "text": Source(
        "text supplied by whoever trained the model",
        "The text was supplied by whoever trained the model, and its terms are theirs to state; this card knows none.",
    ),
}


def is_llama_2(tokenizer: str) -> bool:
    """Return whether a hub name or path refers to LLaMA 2's tokenizer, which the published series uses."""
    name = "/".join(Path(tokenizer).parts[-2:]).lower()
    return re.search(r"llama[-_. ]?2(?!\d)", name) is not None or name.startswith("tjingrant/sparsellm-")


def public_name(tokenizer: str) -> str:
    """Return a hub name unchanged, and only the last part of a path, so that a card says nothing about the machine."""
    return tokenizer if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", tokenizer) else Path(tokenizer).name


def tokenizer_words(tokenizer: str) -> str:
    if tokenizer == "train":
        return "byte-level BPE, trained on this model's training documents"
    owner = "LLaMA 2's" if is_llama_2(tokenizer) else "taken over"
    return f"{owner} (`{public_name(tokenizer)}`)"


def tokenizer_terms(tokenizer: str) -> str:
    llama_2 = f"Meta's [LLaMA 2 Community License]({LLAMA_2_LICENSE_URL})"
    if tokenizer == "train":
        return "It was trained on the data above and has no terms beyond the data's."
    if is_llama_2(tokenizer):
        return f"LLaMA 2's, under {llama_2}."
    return f"`{public_name(tokenizer)}` is under its publisher's terms; for LLaMA 2's tokenizer, that is {llama_2}."


def base_model_terms(init_from: str) -> str:
    return (
        f"`{public_name(init_from)}` is under its publisher's terms, which go with weights that are trained on from it."
    )


def licence_words(card: CardConfig) -> str:
    """Return the model's own licence, or a text that says that none was chosen and how to choose one."""
    if card.license is None:
        return (
            "none was chosen, and none is implied by the software, the data or the tokenizer. Whoever trained the "
            "model chooses one: with `card.license=apache-2.0`, or another of the hub's identifiers, the run's command "
            "rewrites this card and trains nothing anew."
        )
    link = f" ({card.license_link})" if card.license_link else ""
    name = card.license_name or card.license
    return f"`{name}`{link}, chosen by whoever trained the model; it does not replace the terms below."
