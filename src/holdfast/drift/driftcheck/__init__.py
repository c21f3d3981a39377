"""DriftCheck: the pairs written for it (core.jsonl), public sources to build larger suites from, and their likeness."""
