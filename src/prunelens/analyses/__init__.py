"""The questions, one per file; each takes tensors and tables and returns tables."""
