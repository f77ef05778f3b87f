"""Named held-out sets of a run, which are only scored: checked before any text is read, and tokenized like the run's text."""

from __future__ import annotations

from conf.schema import Config
from train.data.pipeline import prepare
from train.data.prepared import PreparedData
from train.data.sources import config_of, places_of, sources_of


def check_sets(config: Config) -> None:
    """Check that the sets exist, and that the run does not train on any of their files.

    Raises:
        ValueError: A set cannot be found, or is trained on.
    """
    if not config.eval.sets:
        return
    trained = set[str]().union(*(places_of(source.config) for source in sources_of(config.data)))
    for asked in config.eval.sets:
        if both := sorted(trained & places_of(config_of(asked, config.data))):
            raise ValueError(
                f"eval.sets: {asked.stem} reads {both[0]}, which the run trains on: take it out of the training data, or "
                "leave it out of eval.sets; held-out documents of the run's own text are scored without it."
            )


def prepare_sets(config: Config, data: PreparedData) -> dict[str, PreparedData]:
    """Tokenize the sets in the same way as the run's own text, and return them by name.

    One process calls it.

    Args:
        config: The run's configuration.
        data: The run's own prepared text.

    Raises:
        ValueError: A set cannot be read, or is shorter than a window.
    """
    found = {}
    for asked in config.eval.sets:
        one = config_of(asked, config.data)
        prepared = prepare(one, data.tokenizer, data.vocab_size, data.sequence_length, heldout_only=True)
        if prepared.heldout.num_tokens < data.sequence_length:
            raise ValueError(
                f"eval.sets: {asked.stem} holds {prepared.heldout.num_tokens} tokens, less than one window of "
                f"{data.sequence_length}: give more text, or leave it out."
            )
        found[asked.stem] = prepared
    return found
