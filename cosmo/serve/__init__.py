"""Serve a model over HTTP: OpenAI's API, and a page to talk to it."""
