"""What must be kept: a pool of sequences, sampled once from the base itself or the user's own. Read next: `pool`."""
