"""The verbs of `python -m data_pipeline`, one module each: flags, and what is done with them."""
