"""Hold the numbers of Kim et al. 2022 ("ProsocialDialog") that Prost is measured beside."""

# Table 3, ProsocialDialog's test split: BLEU-4, F1, perplexity.
TABLE_3 = {
    "Prost (response only)": (3.98, 30.30, 6.31),
    "Prost (RoT & response)": (4.13, 31.13, 6.22),
    "Prost (gold RoT & response)": (4.51, 32.78, 6.16),
}
# The columns of table 8, in its order: our task and the corpus.
CORPORA = {
    "prost_prosocial": "Prosocial",
    "prost_dailydialog": "DailyDialog",
    "prost_topical_chat": "TopicalChat",
    "prost_persona_chat": "PersonaChat",
    "prost_wizard": "WoW",
    "prost_empathetic": "ED",
    "prost_blended": "BST",
}
# Table 8: (perplexity, F1) on each of CORPORA.
TABLE_8 = {
    "GPT-2": (
        *((8.30, 29.38), (11.33, 14.46), (13.54, 17.81), (15.41, 15.96)),
        *((15.47, 19.25), (13.44, 17.61), (17.11, 17.24)),
    ),
    "DialoGPT": (
        *((8.37, 32.01), (11.28, 15.06), (12.89, 18.51), (13.87, 17.37)),
        *((15.92, 19.17), (12.46, 18.05), (15.22, 16.89)),
    ),
    "BART": (
        *((7.92, 33.20), (10.43, 15.65), (14.09, 18.96), (13.89, 17.99)),
        *((14.96, 19.95), (12.00, 19.26), (15.33, 17.42)),
    ),
    "T5": (
        *((7.51, 31.53), (7.74, 13.42), (13.76, 16.68), (12.99, 16.30)),
        *((14.20, 17.92), (11.17, 16.63), (13.48, 15.71)),
    ),
    "BlenderBot": (
        *((6.85, 32.30), (9.71, 15.02), (9.81, 17.71), (10.56, 18.13)),
        *((9.01, 19.66), (9.39, 15.06), (10.71, 17.73)),
    ),
    "PushShift Transformer": (
        *((6.16, 32.78), (8.01, 15.60), (8.99, 18.28), (10.02, 18.02)),
        *((8.94, 19.34), (8.74, 18.86), (10.23, 17.50)),
    ),
    "Prost (response only)": (
        *((6.31, 30.30), (8.11, 15.81), (8.77, 18.45), (9.97, 18.05)),
        *((8.97, 19.40), (8.73, 18.47), (10.14, 17.72)),
    ),
    "Prost (RoT & response)": (
        *((6.22, 31.13), (8.10, 15.80), (8.81, 18.42), (9.97, 17.63)),
        *((9.04, 18.94), (8.73, 18.54), (10.13, 17.67)),
    ),
}
NOTES = """\
Perplexity is of a response's tokens. Those of different vocabularies do not compare: the rows of
GPT-2, DialoGPT, BART and T5 are per token of their own vocabularies, those of BlenderBot, PushShift
and Prost per token of BlenderBot's 8,008. In table 8 PushShift's Prosocial cell (6.16/32.78) equals
table 3's row of gold RoTs: the same model twice, or a slip of the paper."""
