"""CO3: distil social dialogues from a language model (SODA, Kim et al. 2023).

A triple becomes a sentence, a narrative, two speakers, a dialogue, and after filters and new names
a row of SODA. Read `distil` first.
"""
