"""Slow second implementations, written from methods.md alone; they share no code with the first."""
