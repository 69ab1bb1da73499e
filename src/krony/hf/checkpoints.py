"""Model directories: `loading` reads them, `saving` writes them; here under one name."""

from krony.hf.loading import (
    DEMO,
    DTYPES,
    find_tokenizer,
    load,
    load_model,
    load_tokenizer,
    resolve,
    tokenizer_of,
)
from krony.hf.saving import (
    check_destination,
    claim,
    companions,
    directory_bytes,
    discard,
    new_directory,
    save,
    save_model,
    write_file,
    write_json,
    write_text,
)

__all__ = [
    "DEMO",
    "DTYPES",
    "check_destination",
    "claim",
    "companions",
    "directory_bytes",
    "discard",
    "find_tokenizer",
    "load",
    "load_model",
    "load_tokenizer",
    "new_directory",
    "resolve",
    "save",
    "save_model",
    "tokenizer_of",
    "write_file",
    "write_json",
    "write_text",
]
