"""How well does each instrument of refusal detection agree with people?

    HOLDFAST_DATA=... python -m studies.refusal_labels run   # measure, docs/results/refusal/ledger.jsonl and its page
    python -m studies.refusal_labels page                    # only the page, from the ledger

Answers of three systems to XSTest's prompts (Röttger et al., 2024), each labelled by two people, a third deciding. The
instruments of `holdfast.drift` are measured as they are shipped; the same logistic regression trained on the labels
themselves, cross-validated, shows what the features could do. Answers and labels stay outside the repository.
"""
