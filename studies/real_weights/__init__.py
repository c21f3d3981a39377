"""stories260K learns WikiSQL or GSM8K: what keeps its stories, at equal target loss? Three seeds; read `arms` next.

    HOLDFAST_DATA=... python -m studies.real_weights run  [--task sql] [--seeds 0 1 2] [--arms self-replay] [--jobs 1]
    python -m studies.real_weights page                    # docs/real-weights.md from the ledger

stories260K (see examples/stories260k.py) is tuned with LoRA by TRL's SFTTrainer, to which `holdfast.attach` gives each
arm's methods; the pool of self-replay is sampled from the base itself (`holdfast.retain.making`). Every run is judged
after several numbers of steps and with its adapter weakened. The target loss is that of held-out answers; the story
loss that of stories sampled afresh from the base; Oz and WikiText are texts that no pool covers. Settings are chosen on
validation rows and read on test rows, at equal target loss. Killed and started again, it goes on. Data and weights stay
outside the repository.
"""

from .rows import LONGEST, prepare, stories, task_rows, write

__all__ = ["LONGEST", "prepare", "stories", "task_rows", "write"]  # for other studies of the same model
