"""What one does with an encoder and a music collection: index, similar, path, duplicates, tag, map,
embed.

    listen.py    files -> audio, whole or in excerpts, decoded by processes of their own network.py
    audio -> features or tags store.py     library.clmr/: songs in SQLite, their vectors in one
    memory-mapped file search.py    vectors -> similar songs, paths; duplicates.py and copies.py:
    one recording in several files page.py      the collection as a map in one HTML file cli.py
    what one types
It may import prepare and model; nobody imports it.
"""
