"""The texts that krony knows by name."""

_TEXTS = {
    "wikitext2": "WikiText-2 with <unk>: its test set to measure on, its training set otherwise",
    "wikitext2-raw": "WikiText-2 as it was before rare words became <unk>; else the same",
    "wikitext103": "WikiText-103 with <unk>; else the same",
    "lambada": "LAMBADA's test set as OpenAI published it: to measure on only",
    "python-docs": "the language reference inside every Python: nothing to download",
    "python-docstrings": "docstrings of installed Python packages: to calibrate and train on",
    "openwebtext": "OpenWebText, 8 million pages: to train on only",
    "self": "what the model writes itself (to train on, the teacher): to calibrate and train on",
}


def texts() -> dict[str, str]:
    """Each text that has a name, and what it is good for.

    The names are what `krony.compress` and `krony.calibration_windows` take to calibrate on,
    `krony.perplexity` to measure on, and `krony heal --data` to train on. Besides they take files
    and folders (.txt, .jsonl, .json, .parquet, compressed or not) and "owner/set:name:split" for
    data sets of the Hugging Face Hub. What is public on the Hub is read from there, or from the
    folder that the environment variable `KRONY_DATA` names.
    """
    return dict(_TEXTS)
