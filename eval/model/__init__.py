"""One finished model: loaded, checked and scored."""
