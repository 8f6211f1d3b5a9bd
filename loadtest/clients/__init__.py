"""Clients: guidellm, and our own where guidellm cannot do it."""
