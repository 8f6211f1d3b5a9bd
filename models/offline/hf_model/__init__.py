"""A model in transformers, with hooks: what calibration reads and changes."""
