"""Differential privacy's arithmetic: what rounds spend, in what is hidden, and when a budget is spent."""
