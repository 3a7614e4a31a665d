"""How corpora are made: CO3 distils social dialogues from a language model (Kim et al. 2023)."""
