"""Serve a model behind OpenAI's API; see `cosmo.serve.server`."""
