"""What a study survives: see README.md in this folder, and docs/faults.md."""
