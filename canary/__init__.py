"""Canary: safety labels and rules of thumb for dialogues (Kim et al. 2022, "ProsocialDialog")."""
