"""The search for settings that are worth their quality, and how they are measured."""
