"""What the figures show, apart from how they are drawn: tables in, panels out."""
