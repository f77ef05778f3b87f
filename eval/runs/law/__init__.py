"""The scaling law of a set of finished runs: reading the runs, fitting, comparison and display."""
