"""One engine step: what each token runs, the layer loop that runs it, and what is recorded."""
