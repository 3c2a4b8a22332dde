"""Run folders as pictures: read (`run`), drawn (`figures`), and put on one page (`page`).

Reads what `Trainer(out=...)` wrote, and nothing else; starts no MPI. matplotlib and jinja2 are
imported when a figure or a page is asked for.
"""
