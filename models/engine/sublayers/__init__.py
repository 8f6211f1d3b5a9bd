"""The parts of a layer as the loop runs them: attention, MLP, both, or keys and values alone."""
