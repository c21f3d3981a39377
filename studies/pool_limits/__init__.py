"""Where does self-replay stop? What is kept though the pool never showed it, and what is lost; read `arms` next.

    python -m studies.pool_limits run  [--scenario shift rank] [--seeds 0 1 2] [--arms "plain LoRA"] [--jobs 1]
    python -m studies.pool_limits page                     # docs/pool-limits.md from the ledger

`lab-aligned` is tuned on a harmless task with self-replay, and its pool is changed: a skill is taken out of it, or
every refusal, or a whole format; it is made small, or of short sequences, or something cheap is added to it. All are
compared at equal loss of the task with the pool as it is by default and with plain LoRA. Killed and started again, it
goes on.
"""
