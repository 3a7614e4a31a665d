"""A scripted teacher: a local server that answers CO3's prompts as a language model might.

For tests, the demo and first tries without a bill. It understands nothing, but its answers are
varied, plausible, and always the same for the same request.
"""
