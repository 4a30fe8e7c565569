"""Results -> tables -> figures -> a summary. Nothing here computes a statistic."""
