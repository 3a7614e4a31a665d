"""Command-line helpers: the sample corpus, its vocabulary and other build steps."""
