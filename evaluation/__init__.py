"""What an evaluation needs beside windows, probes and metrics; evaluate.py's program needs it, and
its functions do not. Nothing here imports anything of ours: what is needed is handed in.

    intervals.py   resamples of the test songs, intervals of metrics and of differences to controls
    neighbours.py  what the nearest clips have in common, as metrics
    store.py       features on the disk: those kept for the next time, those that others made
    epochs.py      random windows in random order, for a network that is trained end to end
    command.py     flags that make sense, data that fit, names of files, and how a command ends
"""
