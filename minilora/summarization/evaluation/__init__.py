"""Summaries by beam search, ROUGE, and the comparison of two models."""
