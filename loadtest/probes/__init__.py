"""What is read beside the load: the server's process, its memory and its `/metrics`."""
