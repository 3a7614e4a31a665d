"""Modules that every room may use: errors, settings, files, progress, command line. No JAX."""
