"""The probes, one file each: what is asked of both sides, and what is made of the answers."""
