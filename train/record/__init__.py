"""What a run leaves in its folder, written and read in one place: config, records, summary, figure, model card."""
