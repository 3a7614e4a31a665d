"""How corpora are made: a room for each corpus (`co3` makes SODA), and `calls` to a model."""
