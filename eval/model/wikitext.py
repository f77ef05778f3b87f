"""WikiText, or any other text, as the conventions of perplexity read it: by rows, by pages, and as ordinary prose.

Token-level figures read the rows of Salesforce/wikitext. The word-level figure reads articles, divided as in
EleutherAI/wikitext_document_level and rewritten as in lm-evaluation-harness.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from conf.schema import DataConfig
from train.data import hub
from train.data.encoding import BYTE_ORDER_MARK, MANY_NULS, has_many_nuls, not_utf8
from train.data.fields import checked_text, field_names
from train.data.parts import explained

REPOSITORY = "Salesforce/wikitext"
SUBSET = "wikitext-2-raw-v1"
"""The subset to read: its test split is the same as WikiText-103's."""
BLANK_LINE = " \n"
"""The line of the original file that the hub stores as an empty row."""

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_PAGE_TITLE = re.compile(r"= (?!=).*(?<!=) =")

PROSE: tuple[tuple[str, str], ...] = (
    (r"s '", "s'"),
    # The tokenizer of WikiText wrote 1,000 as 1 @,@ 000.
    *((f" @{re.escape(sign)}@ ", sign) for sign in "-,."),
    *((f" {re.escape(sign)} ", f"{sign} ") for sign in ":;.!?,"),
    # Remove spaces inside brackets and quotes.
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)
"""The rewriting rules of the wikitext task 2.0 of lm-evaluation-harness, in the same order."""


@dataclass(frozen=True)
class WikiText:
    """A text in WikiText's format. Any other text can be read as one, usually as a single page."""

    source: str
    """The contents of the file."""

    @cached_property
    def lines(self) -> list[str]:
        """The lines of the text, each with its line break."""
        return _LINE.findall(self.source)

    @cached_property
    def text(self) -> str:
        """The text that token-level figures score: all rows, blank ones as '', joined by empty lines."""
        return "\n\n".join(line if line.strip() else "" for line in self.lines)

    @cached_property
    def pages(self) -> list[str]:
        """The articles: each begins at a title ` = Like this = `; text before the first title is one as well."""
        starts: list[list[str]] = [[]]
        for line in self.source.split("\n"):
            if _PAGE_TITLE.fullmatch(line.strip()):
                starts.append([])
            starts[-1].append(line)
        pages = ["\n".join(lines) for lines in starts]
        return [page for page in pages[:-1] if page.strip()] + pages[-1:]

    @property
    def num_words(self) -> int:
        """The number of words separated by white space, by which WikiText's size is usually given."""
        return len(self.source.split())

    @property
    def num_page_words(self) -> int:
        """The number of words by lm-evaluation-harness: each page is split at white space, and empty pieces at its ends
        count."""
        return sum(len(re.split(r"\s+", page)) for page in self.pages)

    @property
    def sha256(self) -> str:
        """The hash of the text in UTF-8."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def first_pages(self, num_pages: int) -> WikiText:
        """Return a text of only the first pages."""
        return WikiText("\n".join(self.pages[:num_pages]))


def as_prose(page: str) -> str:
    """Return a page without the spaces that WikiText puts around punctuation and inside numbers."""
    for pattern, replacement in PROSE:
        page = re.sub(pattern, replacement, page)
    return page


def read_wikitext(config: DataConfig) -> WikiText:
    """Return the text of data.path, or the hub's test split.

    Raises:
        ValueError: The file cannot be read, or the hub's split cannot be fetched.
    """
    if config.path is None:
        text = WikiText(_from_hub(config.subset or SUBSET))
    else:
        path = Path(config.path).expanduser()
        if not path.is_file():
            raise ValueError(
                f"data.path={config.path} is not a file: give a text file such as wiki.test.raw, or a .parquet."
            )
        is_parquet = path.suffix.lower() == ".parquet"
        text = WikiText(_from_parquet(path, config.text_field) if is_parquet else _from_text(path))
    if config.max_documents is not None:
        text = text.first_pages(config.max_documents)
    if not text.source.strip():
        raise ValueError(f"data.path={config.path} holds no text: give a file with some.")
    return text


def _from_text(path: Path) -> str:
    with explained(f"data.path={path}"):
        data = path.read_bytes()
    try:
        text = data.decode().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"data.path={path}, line {line} {not_utf8(path)}") from None
    if has_many_nuls(data):
        raise ValueError(f"data.path={path}, line 1 {MANY_NULS}")
    return text


def _from_parquet(path: Path, text_field: str) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with explained(f"data.path={path}"):
            names = pq.read_schema(path).names
            if text_field not in names:
                raise ValueError(
                    f"data.path={path} has no column {text_field}, only {field_names(names)}: name the column with the "
                    "text in data.text_field."
                )
            rows = pq.read_table(path, columns=[text_field]).column(0).to_pylist()
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"data.path={path} is not a readable parquet file ({reason}): download it again.") from None
    texts = []
    for index, row in enumerate(rows):
        try:
            texts.append("" if row is None else checked_text(row, text_field))
        except UnicodeDecodeError:
            raise ValueError(f"data.path={path}, row {index} is not UTF-8: write it again as UTF-8.") from None
        except ValueError as error:
            raise ValueError(f"data.path={path}, row {index} {error}") from None
    return _as_file(texts)


def _from_hub(subset: str) -> str:
    import datasets
    from huggingface_hub import constants

    if not (is_online := hub.is_reachable()):
        # Otherwise both libraries would retry for half a minute before they look in their caches.
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        rows = datasets.load_dataset(REPOSITORY, subset, split="test")
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        reason = first_line if is_online else f"it does not answer, and the local cache has no {REPOSITORY}"
        raise ValueError(
            f"data=wikitext cannot be fetched from the hub ({reason}): connect to the network, or give its test file in "
            "data.path."
        ) from None
    return _as_file(list(rows["text"]))


def _as_file(rows: list[str]) -> str:
    return "".join(row or BLANK_LINE for row in rows)
