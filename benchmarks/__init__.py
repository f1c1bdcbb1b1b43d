"""Benchmarks: one script a question; each prints a table and writes it as CSV to `results/`. See README.md."""
