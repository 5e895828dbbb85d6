"""What one does with an encoder and a music collection: index, similar, path, and so on.

    listen.py       files -> audio, whole or in excerpts, decoded by processes of their own
    network.py      audio -> features or tags
    store.py        library.clmr/: songs in SQLite, their vectors in one memory-mapped file
    index.py        a folder -> the store
    search.py       vectors -> similar songs, and paths from one to another
    duplicates.py   one recording in several files, as copies.py knows it
    tags.py         what a tagger hears
    embed.py        recordings -> npz
    targets.py      where outcomes go, and what is done of them so far
    page.py         the collection as a map, one HTML file (map.html, with its songs)
    cli.py          what one types; terminal.py: what one sees
It may import prepare and model; nobody imports it.
"""
