"""The contract: what a method is, what it may see, and the order of events of a step. Imports torch alone."""
