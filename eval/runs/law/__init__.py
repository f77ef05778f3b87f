"""The scaling law of a set of finished runs: read, fitted, compared, shown."""
