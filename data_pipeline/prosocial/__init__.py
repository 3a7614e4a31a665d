"""Build a ProsocialDialog: situations, drafts by a model, rounds with people, safety labels.

Kim et al. 2022, section 3 and appendix A. `make.py` has the stages in their order.
"""
