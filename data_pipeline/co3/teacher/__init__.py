"""A scripted teacher: a local server that answers CO3's prompts as a language model might.

For tests, the demo and trying things out without a bill: it understands nothing, but what it says
is varied, plausible, and always the same for the same request.
"""
