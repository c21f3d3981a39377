"""Recipes: a training run written in one YAML file, checked whole before anything starts, and resumed if killed."""
