"""The console: one static page that shows what a policy does, through the public API alone."""
