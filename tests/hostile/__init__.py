"""Input that someone made to do harm: it ends in one line, and nothing else happens."""
