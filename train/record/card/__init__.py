"""The model card: model/README.md in the hub's format, made only from the run's figures.

`text` puts the card together from the sections in `model`, `figures` and `training`, after the yaml of `header`.
"""

from train.record.card.text import card_text, write_card

__all__ = ["card_text", "write_card"]
