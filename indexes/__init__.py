"""The store: a folder with a SQLite catalogue, the truth, and FAISS files, a cache of it."""
