"""The lab: a small world made by code, two tiny models that live in it, and what to tune and measure there.

Forgetting must be visible in minutes on a laptop, with no download, so that every claim can be tried by anyone. The
world has skills, one of them rare, facts, stories, how-to questions and forbidden subjects; `lab-pretrained` has learnt
all of it and refuses nothing, `lab-aligned` is the same model after safety training. `build` makes both again.

The public face:

    path(name) -> Path                                    # a directory for `AutoModelForCausalLM.from_pretrained`
    load(name="lab-aligned", dtype=None) -> (model, tokenizer)      # float32 unless said otherwise

    task(name, split="train", n=None, seed=0) -> list[Example]      # "shift" | "second"; prompt and completion
    safety_sft(n=400, split="train", seed=0) -> list[Example]       # forbidden prompts and refusals
    preference_pairs(n=400, split="train", seed=0) -> list[Example] # prompt, chosen, rejected
    retain_preferences(n=256, split="train", seed=0) -> list[Example]      # general: {"prompt", "chosen", "rejected"}
    retain(n=256, split="train", seed=0, form="text") -> list[Example]  # "text" · "chat": {"messages"} · "completion"

    evaluate(model, tokenizer, tasks=("shift",), split="test", items_per_skill=40, batch_size=128) -> Scores
    Scores: .skills .skill_mean .skill_log_likelihood .rare .refusal .over_refusal .benign .tasks .adaptation
            .story_perplexity .as_dict();  each Score: .value .stderr .n .log_likelihood .items .log_likelihoods

    holdfast.lab.build.build(output_dir, seed=0, steps=None, progress=True) -> dict[str, Path]

`Example` is a plain dict in TRL's conversational format, e.g.
`{"prompt": [{"role": "user", "content": ...}], "completion": [{"role": "assistant", "content": ...}]}`.
Read `world` next; docs/lab.md has the measured scores.
"""

from holdfast.lab.models import NAMES, load, path
from holdfast.lab.scoring import Score, Scores, evaluate
from holdfast.lab.tasks import TASKS, Example, preference_pairs, retain, retain_preferences, safety_sft, task

__all__ = [
    "NAMES",
    "TASKS",
    "Example",
    "Score",
    "Scores",
    "evaluate",
    "load",
    "path",
    "preference_pairs",
    "retain",
    "retain_preferences",
    "safety_sft",
    "task",
]
