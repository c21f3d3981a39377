"""Five questions, answered at equal learning: do the papers' methods keep more, do two, and what is the best default?

    python -m studies.results prepare                  # rows and model that the recipes read, into runs/results-data/
    python -m studies.results run [NAME ...]           # recipes/results/*.yaml by `holdfast compare`; goes on if killed
    python -m studies.results page                     # docs/results/*.md, figures and ledgers; works on a part too

`prepare` and `run` work below the folder in which they are run (`--work` names another). HOLDFAST_DATA names the folder
with tinylm/, capability/ and text/; without it the lab's comparisons alone can be run. Two pages need no runs of their
own: they read the ledgers of `studies.alignguard`, `studies.alignment_tax` and `studies.stories_safety`.
Read next: `comparisons`, what is compared; docs/compare.md.
"""
