"""Human evaluation: pages, task files, answers, model judges, statistics (both papers' studies).

A task file holds everything that a judge sees. Servers, exports and importers share its checks, so
an answer means the same wherever it was given.
"""
