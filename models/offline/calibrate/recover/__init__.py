"""The step `recover`: adapters that make up for blocks that are left out."""
