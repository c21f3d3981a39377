"""What does it cost a model to learn refusals, and which methods lower the price at equal refusal? Read `arms` next.

    python -m studies.alignment_tax run  [--pipeline sft dpo sft_dpo sft_large] [--seeds 0 1] [--arms naive] [--jobs 2]
    python -m studies.alignment_tax page                   # docs/alignment-tax.md from the ledger

`lab-pretrained` answers forbidden how-to questions. Safety training with LoRA teaches it to refuse them (SFT on
refusals, DPO on pairs, or one after the other), and it begins to refuse harmless look-alikes and to lose its skills:
the alignment tax. Every arm sweeps its learning rate and is judged at several step counts of one run (the rate is
constant after the warm-up, so a prefix is a shorter run). Settings are chosen on the validation split, values read on
the test split, arms compared at equal refusal of unseen forbidden prompts. Killed and started again, it goes on.
"""
