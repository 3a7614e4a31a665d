"""Reading: SeqIO in a process of its own, and the cache of packed rows."""
