"""Pure tensor mathematics, usable without anything else of holdfast; imports torch alone."""
