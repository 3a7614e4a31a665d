"""One-off commands and benchmarks: not installed, and nothing imports them."""
