"""What does self-replay keep in the lab, at equal learning? Read `arms` next.

    python -m studies.self_replay run  [--scenario shift second] [--seeds 0 1 2 3 4] [--arms "plain LoRA"] [--jobs 1]
    python -m studies.self_replay cost                     # times the arms, with nothing else on the machine
    python -m studies.self_replay page                     # docs/self-replay.md from the ledger

`lab-aligned` learns a harmless task with LoRA and forgets to refuse, its skills and its stories. Self-replay takes a
quarter of every batch away from the task and runs sequences there that the base wrote once, held to the base's own
distributions. The rivals: nothing, decay of the update, divergences on the task's own tokens, the same sequences as
ordinary data, and true data in their place. What arms kept is compared at equal loss of the task on unseen prompts.
Killed and started again, it goes on.
"""
