"""SAEs as others have them: their files read and written, folders and cards for the hub."""
