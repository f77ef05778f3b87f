"""The tokenizer of a run: trained here, or loaded from a folder, a SentencePiece model or the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train.data import hub

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
MIN_TRAINED_VOCABULARY = 257
PROBE = "A  probe, 1234:\n\t    déjà vu ﬁ 你好 🙂 "
SENTENCEPIECE_NAME = "tokenizer.model"
LONGEST_RUN = 1000
LONG_RUN = re.compile(rf"(?<!\S)\S{{{LONGEST_RUN + 1},}}|(?<!\s)\s{{{LONGEST_RUN + 1},}}")
# The lookbehinds make the search linear: without them, it would try each character of a run.


def train_bpe(texts: Iterable[str], vocab_size: int, file: Path) -> None:
    """Train a byte-level BPE and write it as tokenizer.json; id 0 is `<|endoftext|>`.

    Any text is unchanged by encoding and decoding it. Training uses all cores, and the order of the texts does not
    matter.

    Args:
        texts: The texts to train on.
        vocab_size: The largest number of tokens, at least `MIN_TRAINED_VOCABULARY`.
        file: The file to write.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in without_long_runs(text)), trainer)
    tokenizer.save(str(file))


def without_long_runs(text: str) -> list[str]:
    """Cut `text` inside runs of more than `LONGEST_RUN` characters without, or of only, white space.

    Training takes time with the square of a word's length: a line of a million letters would never end.
    """
    pieces, start = [], 0
    for run in LONG_RUN.finditer(text):
        for stop in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
            pieces.append(text[start:stop])
            start = stop
    return [*pieces, text[start:]]


def wrap_bpe(file: Path, max_length: int) -> PreTrainedTokenizerBase:
    """Return a transformers tokenizer around `train_bpe`'s file, with `<|endoftext|>` as its eos and bos."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, a SentencePiece `.model` file (read like LLaMA's) or a hub name.

    No code from the folder or the hub is run. If a folder has tokenizer.model but no tokenizer.json, the tokenizer is
    read from tokenizer.model, with its dummy prefix.

    Raises:
        ValueError: There is no such tokenizer, or it cannot be read.
    """
    path = Path(spec).expanduser()
    if path.is_dir() and (path / SENTENCEPIECE_NAME).exists() and not (path / "tokenizer.json").exists():
        return load_sentencepiece(path / SENTENCEPIECE_NAME)
    if path.is_file():
        if path.suffix != ".model":
            raise ValueError(f"tokenizer={spec} is not a tokenizer: give a folder or a SentencePiece .model file.")
        return load_sentencepiece(path)
    if not path.exists() and (spec.startswith((".", "~", "/")) or spec.endswith(".model") or spec.count("/") > 1):
        raise ValueError(f"tokenizer={spec} does not exist: give a folder, a .model file, a hub name or `train`.")

    return _from_folder(spec, path) if path.exists() else _from_hub(spec)


def _from_folder(spec: str, folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"tokenizer={spec} cannot be loaded ({_first_line(error)}): "
            "give a folder that transformers' save_pretrained wrote."
        ) from None


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    online = hub.is_reachable()
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=not online)
    except Exception as error:
        reason = _first_line(error) if online else "it does not answer, and the local cache has none of that name"
        raise ValueError(
            f"tokenizer={name} is not a folder here and cannot be fetched from the hub ({reason}): "
            "connect to the network, give a folder or .model file, or tokenizer=train."
        ) from None


def load_sentencepiece(model: Path) -> PreTrainedTokenizerBase:
    """Return a fast tokenizer with the same ids as SentencePiece, for a model like LLaMA's; it adds no bos.

    It is built here because the conversion in transformers 5.23 ranks merges by id instead of score, so that two spaces
    become one token, and because it drops the dummy prefix before a space.

    Raises:
        ValueError: The file is not a SentencePiece model, or does not encode as LLaMA's does.
    """
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerFast

    remedy = "give a model like LLaMA's (BPE, byte fallback, dummy prefix), or a folder with tokenizer.json"
    try:
        reference = SentencePieceProcessor(model_file=str(model))
    except Exception:
        raise ValueError(f"tokenizer={model} is not a SentencePiece model: {remedy}.") from None
    ids = range(len(reference))
    backend = _sentencepiece_bpe(reference.id_to_piece(list(ids)), reference.get_score(list(ids)))
    named = {"unk_token": reference.unk_id(), "bos_token": reference.bos_id(), "eos_token": reference.eos_id()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{name: reference.id_to_piece(token) for name, token in named.items() if token >= 0},
    )
    if tokenizer.encode(PROBE, add_special_tokens=False) != reference.encode(PROBE):
        raise ValueError(f"tokenizer={model} does not encode like LLaMA's: {remedy}.")
    return tokenizer


def _sentencepiece_bpe(pieces: Sequence[str], scores: Sequence[float]) -> Tokenizer:
    """Return a BPE whose merges are all splits of a piece into two pieces, ordered by highest score, then lowest id."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [
        (-scores[index], index, piece[:cut], piece[cut:])
        for piece, index in vocabulary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def separator_of(tokenizer: PreTrainedTokenizerBase, spec: str) -> int:
    """Return the id that ends a document: eos, or else bos.

    Raises:
        ValueError: The tokenizer `spec` has neither.
    """
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(f"tokenizer={spec} has no eos or bos token to end documents with: set its eos_token.")


def bos_of(tokenizer: PreTrainedTokenizerBase, spec: str) -> int:
    """Return the id that begins a document if data.bos=true.

    Raises:
        ValueError: The tokenizer `spec` has no bos.
    """
    if tokenizer.bos_token_id is None:
        raise ValueError(f"data.bos=true needs a bos token, but tokenizer={spec} has none: set data.bos=false.")
    return int(tokenizer.bos_token_id)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase | Tokenizer) -> int:
    """Return one more than the largest id."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: PreTrainedTokenizerBase | Tokenizer, vocab_size: int, spec: str) -> None:
    """Check that a tokenizer has no more tokens than the model.

    Args:
        tokenizer: The tokenizer.
        vocab_size: The model's vocabulary size.
        spec: The user's name for the tokenizer, for the error.

    Raises:
        ValueError: It has more.
    """
    if (size := vocabulary_of(tokenizer)) > vocab_size:
        raise ValueError(
            f"tokenizer={spec} has {size} tokens, more than model.vocab_size={vocab_size}: use a smaller tokenizer, or "
            f"set model.vocab_size={size} (with model.path: model.overrides={{vocab_size: {size}}})."
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
