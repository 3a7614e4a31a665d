"""The verbs `annotate ...`; each module has the flags and the function of one."""
