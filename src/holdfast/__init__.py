"""holdfast: fine-tune language models with LoRA without losing what they knew or how they were aligned."""
