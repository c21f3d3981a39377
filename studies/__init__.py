"""Experiments, one each: every one keeps its ledger in docs/results/ and writes its page in docs/ from it."""
