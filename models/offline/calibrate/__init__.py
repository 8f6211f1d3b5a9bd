"""Calibration: what a profile of a model holds, measured or trained on the user's prompts.

A step a module; `pipeline` runs them in order, and `workspace` keeps what is done, so that a run
that was stopped goes on where it was.
"""
