"""What `plan` tells before anything runs: what is wrong, what it needs, how long it takes."""
