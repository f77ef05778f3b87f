"""The files in a run's folder, written and read in one place: config, records, summary, figure, model card."""
