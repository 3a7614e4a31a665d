"""Calls to a language model: requests, limits, retries, a journal of answers, resumable outputs.

It knows no corpus: stages are generators of requests, and a room such as `co3` writes them.
"""
