"""What somebody else would write to ask one more question."""
