"""What a run measured, as numbers, verdicts, plots, files and a page."""
