"""Artifacts: named by what made them, written whole, verified; in a folder or an object store."""
