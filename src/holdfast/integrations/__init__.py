"""Thin adapters for hosts: the only place that imports transformers, TRL, PEFT and accelerate."""
