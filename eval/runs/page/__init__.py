"""Runs side by side: the list of panels, and the page drawn from it."""
