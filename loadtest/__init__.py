"""Load tests: scenario files, and a thin runner over guidellm that plays them against a server."""
