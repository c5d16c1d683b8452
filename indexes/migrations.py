"""Numbered changes of the catalogue's schema, applied in order and recorded in the database.

A migration never changes once released: it is plain SQL, in the words of the dialect where they
differ, and independent of the tables that `catalogue` describes today.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

# Types whose names differ between databases. AUTOINCREMENT: ids of removed rows are never given
# out again, because a FAISS file may still hold their vectors.
WORDS: Mapping[str, Mapping[str, str]] = {
    "sqlite": {
        "key": "INTEGER PRIMARY KEY AUTOINCREMENT",
        "blob": "BLOB",
        "words": "CREATE VIRTUAL TABLE words USING fts5(captions, name, folders,"
        " tokenize = 'porter unicode61 remove_diacritics 2')",
    },
}
# Which migrations a database has had; made before the first one.
RECORD = """CREATE TABLE IF NOT EXISTS schema_migrations (
    number INTEGER NOT NULL PRIMARY KEY,
    name TEXT NOT NULL,
    applied_at TEXT NOT NULL)"""


def m001_create_tables(words: Mapping[str, str]) -> Sequence[str]:
    """Roots, items, captions, models, embeddings, and the record of FAISS files."""
    key, blob = words["key"], words["blob"]
    embeddings = [
        statement
        for table, owner in (("image_embeddings", "items"), ("caption_embeddings", "captions"))
        for statement in (
            f"""CREATE TABLE {table} (
                owner_id BIGINT NOT NULL REFERENCES {owner} (id) ON DELETE CASCADE,
                model_id BIGINT NOT NULL REFERENCES models (id) ON DELETE CASCADE,
                change BIGINT NOT NULL,
                vector {blob} NOT NULL,
                PRIMARY KEY (model_id, owner_id))""",
            f"CREATE INDEX {table}_by_owner ON {table} (owner_id)",
            f"CREATE INDEX {table}_by_change ON {table} (model_id, change)",
        )
    ]
    return [
        f"""CREATE TABLE models (
            id {key},
            name TEXT NOT NULL,
            dim INTEGER NOT NULL CHECK (dim > 0),
            fingerprint TEXT NOT NULL UNIQUE)""",
        """CREATE TABLE store_info (
            id INTEGER PRIMARY KEY CHECK (id = 1),
            model_id BIGINT NOT NULL REFERENCES models (id),
            generation BIGINT NOT NULL,
            change BIGINT NOT NULL)""",
        f"CREATE TABLE roots (id {key}, path {blob} NOT NULL UNIQUE)",
        f"""CREATE TABLE items (
            id {key},
            root_id BIGINT NOT NULL REFERENCES roots (id) ON DELETE CASCADE,
            file {blob} NOT NULL,
            size BIGINT NOT NULL,
            mtime_ns BIGINT NOT NULL,
            content_hash {blob},
            width INTEGER NOT NULL,
            height INTEGER NOT NULL,
            taken TIMESTAMP,
            status TEXT NOT NULL CHECK (status IN ('ok', 'failed')),
            reason TEXT,
            UNIQUE (root_id, file))""",
        "CREATE INDEX items_by_content ON items (content_hash)",
        f"""CREATE TABLE captions (
            id {key},
            item_id BIGINT NOT NULL REFERENCES items (id) ON DELETE CASCADE,
            position INTEGER NOT NULL,
            text TEXT NOT NULL,
            source TEXT NOT NULL,
            UNIQUE (item_id, position))""",
        *embeddings,
        """CREATE TABLE tombstones (
            kind TEXT NOT NULL,
            model_id BIGINT NOT NULL REFERENCES models (id) ON DELETE CASCADE,
            owner_id BIGINT NOT NULL,
            change BIGINT NOT NULL,
            PRIMARY KEY (kind, model_id, owner_id))""",
        """CREATE TABLE index_files (
            kind TEXT NOT NULL,
            model_id BIGINT NOT NULL REFERENCES models (id) ON DELETE CASCADE,
            name TEXT NOT NULL,
            generation BIGINT NOT NULL,
            change BIGINT NOT NULL,
            rows BIGINT NOT NULL,
            size_bytes BIGINT NOT NULL,
            mtime_ns BIGINT NOT NULL,
            checksum TEXT NOT NULL,
            PRIMARY KEY (kind, model_id))""",
    ]


def m002_remember_full_runs(words: Mapping[str, str]) -> Sequence[str]:
    """When a root was last indexed as a whole; FAISS files are known by their checksum alone."""
    return [
        "ALTER TABLE roots ADD COLUMN indexed_at TIMESTAMP",
        "ALTER TABLE index_files DROP COLUMN mtime_ns",
    ]


def m003_approximate_files(words: Mapping[str, str]) -> Sequence[str]:
    """Approximate indexes beside the FAISS files, and how a library may search."""
    return [
        """CREATE TABLE approximate_files (
            kind TEXT NOT NULL,
            model_id BIGINT NOT NULL REFERENCES models (id) ON DELETE CASCADE,
            name TEXT NOT NULL,
            generation BIGINT NOT NULL,
            change BIGINT NOT NULL,
            rows BIGINT NOT NULL,
            size_bytes BIGINT NOT NULL,
            checksum TEXT NOT NULL,
            facts TEXT NOT NULL,
            PRIMARY KEY (kind, model_id))""",
        "ALTER TABLE store_info ADD COLUMN policy TEXT",
    ]


def m004_facts_words_and_fits(words: Mapping[str, str]) -> Sequence[str]:
    """Facts of a picture's file, further columns of captions files, words, what was measured.

    The rows of `words` are derived: `Catalogue.migrate` makes those of a library that is there.
    """
    key, blob = words["key"], words["blob"]
    return [
        "ALTER TABLE items ADD COLUMN camera TEXT",
        "ALTER TABLE items ADD COLUMN latitude REAL",
        "ALTER TABLE items ADD COLUMN longitude REAL",
        "ALTER TABLE items ADD COLUMN perceptual_hash BIGINT",
        "ALTER TABLE items ADD COLUMN facts INTEGER NOT NULL DEFAULT 0",
        f"""CREATE TABLE extras (
            id {key},
            item_id BIGINT NOT NULL REFERENCES items (id) ON DELETE CASCADE,
            key TEXT NOT NULL,
            text TEXT,
            number REAL)""",
        "CREATE INDEX extras_by_item ON extras (item_id)",
        "CREATE INDEX extras_by_text ON extras (key, text)",
        "CREATE INDEX extras_by_number ON extras (key, number)",
        f"""CREATE TABLE fits (
            model_id BIGINT NOT NULL PRIMARY KEY REFERENCES models (id) ON DELETE CASCADE,
            change BIGINT NOT NULL,
            rows BIGINT NOT NULL,
            facts TEXT NOT NULL,
            means {blob} NOT NULL)""",
        words["words"],
        "CREATE VIRTUAL TABLE words_terms USING fts5vocab(words, row)",
        "CREATE VIRTUAL TABLE words_places USING fts5vocab(words, instance)",
    ]


def m005_derived_models(words: Mapping[str, str]) -> Sequence[str]:
    """Models whose embeddings follow from those of another by a head, and what that brought."""
    return [
        "ALTER TABLE models ADD COLUMN base_id BIGINT REFERENCES models (id)",
        f"ALTER TABLE models ADD COLUMN head {words['blob']}",
        "ALTER TABLE models ADD COLUMN facts TEXT",
    ]


MIGRATIONS: tuple[Callable[[Mapping[str, str]], Sequence[str]], ...] = (
    m001_create_tables,
    m002_remember_full_runs,
    m003_approximate_files,
    m004_facts_words_and_fits,
    m005_derived_models,
)
