"""Does OGPSA keep a real model's stories while it learns to refuse, at equal refusal? Three seeds; read `arms` next.

    HOLDFAST_DATA=... python -m studies.stories_safety run [--arms naive replay] [--seeds 0 1 2]
    python -m studies.stories_safety page                  # docs/stories-safety.md from the ledger

stories260K (see examples/stories260k.py) learns to answer AdvBench's prompts with one sentence. How firmly it has
learnt is read on HarmBench's prompts, what it lost on stories sampled from the base itself, on Oz and on benign
prompts. Every arm sweeps its learning rate and is judged at several step counts of one run (the rate is constant after
the warm-up, so a prefix is a shorter run). Settings are chosen on validation rows and read on test rows, at equal loss
of the refusal. Killed and started again, it goes on. Data and weights stay outside the repository.
"""
