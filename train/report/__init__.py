"""What a finished run says: summary, table line, figure, model card."""
