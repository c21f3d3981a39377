"""What does `holdfast drift` find where drift was planted, and does it find nothing where there is none?

    HOLDFAST_DATA=... python -m studies.drift_found run    # measure what is missing, then the page
    python -m studies.drift_found page                     # only the page, docs/results/drift/README.md

Adapters that change nothing, adapters that are known to harm, one evaluation done twice, and items whose two sides
changed places: on the lab's model and on stories260K, real weights of a megabyte. Killed and started again, it goes on.
Adapters, models and answers stay in the working folder, data outside the repository. Read `adapters` next.
"""
