"""Which terms of AlignGuard-LoRA earn their place, and is drift halved? At equal learning; read `arms` next.

    python -m studies.alignguard run  [--scenario shift second] [--seeds 0 1 2] [--arms "plain LoRA"] [--jobs 1]
    HOLDFAST_DATA=... python -m studies.alignguard run --scenario stories
    python -m studies.alignguard cost                      # times the arms, with nothing else on the machine
    python -m studies.alignguard page                      # docs/alignguard.md from the ledger

In the lab `lab-aligned`, which refuses, learns a harmless task with LoRA and forgets to refuse. Each arm protects it in
its own way, at several strengths; each run is judged after its last step, with its adapter weakened too. What arms
kept is compared at equal loss of the task on unseen prompts: of forbidden ones, one half chooses settings, the other is
reported. In the scenario `stories`, stories260K learns SQL, and its stories must stay.
Killed and started again, it goes on.
"""
