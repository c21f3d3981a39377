"""What was lost? Probes measure it, and the ledger keeps what they found."""
