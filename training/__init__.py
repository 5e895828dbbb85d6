"""What keeps a training run fed, whole and written down; pretrain.py's program needs it, and its
functions do not. Nothing here imports anything of ours: what is needed is handed in.

    ahead.py      the views of the next steps, made while the current step runs
    cpc.py        the objective of --method cpc
    processes.py  several processes as one run, on one machine or many, that ends well
    journal.py    log.jsonl, its curves, and a quick probe of the representation
"""
