"""What the ledger shows: frontiers, comparisons at matched learning, figures and reports; never imports torch."""
