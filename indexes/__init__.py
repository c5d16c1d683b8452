"""The store: a folder with a SQLite catalogue, which is the truth, and FAISS files, which are a cache of it."""
