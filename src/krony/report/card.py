"""A model card in the Hub's format, from what a directory says about itself; and its upload."""

from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from krony.errors import KronyError, first_line
from krony.hf.loading import load_model
from krony.report.models import predicted
from krony.report.parts import machine, megabytes, million
from krony.report.read import Directory, directory

CARD = "README.md"


def card(folder: Path, base: str | None = None, license_id: str | None = None) -> ModelCard:
    """The card of a directory that krony wrote.

    Args:
        base: the Hub name of the model that it was made from.
        license_id: of that model, as the Hub writes it (apache-2.0).
    Raises:
        KronyError: no directory of a model.
    """
    found = directory(folder)
    data = ModelCardData(
        base_model=base,
        license=license_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["krony", "compression"],
    )
    parts = [f"# {found.name}", *_made(found, base), *_healed(found), *_loading(found)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _made(found: Directory, base: str | None) -> list[str]:
    dense, source = found.dense_parameters, found.provenance
    before = f"; {base or 'the dense model'} has {million(dense)}" if source else ""
    size = f"{million(found.parameters)} parameters, {megabytes(found.bytes)} in {found.dtype}"
    lines = [f"{size}{before}."]
    if not source:
        return lines
    how = f"Made smaller by [krony](https://arxiv.org/abs/2412.12351), seed {source.get('seed')}"
    if found.plan is not None:
        how += f": {len(found.plan.matrices)} matrices, factors by {source.get('init')}"
    lines.append(how + ".")
    if (harm := predicted(found)) is not None:
        lines.append(f"Predicted harm before healing: {harm:.3f} nats a token.")
    for text in source.get("texts", []):
        lines.append(f"- {text.get('use')}: {text.get('name')} ({text.get('origin')})")
    return lines


def _healed(found: Directory) -> list[str]:
    if found.heal is None:
        return []
    settings, curve = found.heal["settings"], found.heal["curve"]
    best = found.heal["best_held_out"]
    versions = ", ".join(f"{k} {v}" for k, v in machine([found.heal.get("environment", {})]))
    return [
        "## Healing",
        f"{settings['tokens']:,} tokens of {', '.join(found.heal.get('data', []))}, loss "
        f"{settings['loss']}, recipe {settings['recipe']}, seed {settings['seed']}. Held-out loss "
        f"{curve[0]['held_out']:.4f} before, {best:.4f} at best. {versions}.",
    ]


def _loading(found: Directory) -> list[str]:
    first = "import krony  # registers the loader\n" if found.plan is not None else ""
    code = (
        f"{first}from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS MODEL")'
    )
    lines = ["## Loading", f"```python\n{code}\n```"]
    if found.plan is not None:
        lines.append(
            "For runtimes without krony: `krony export MODEL DENSE --to dense` writes an ordinary "
            "checkpoint of the dense model's size."
        )
    return lines


def push(
    folder: Path, repository: str, made: ModelCard, *, private: bool = False, dry: bool = False
) -> dict[str, int]:
    """Upload a directory and its card in one commit.

    A README.md that the directory has already is uploaded instead of the card.

    Args:
        dry: upload nothing.
    Returns:
        Bytes by file.
    Raises:
        KronyError: no name of the Hub; a model that does not load, or that is not what krony
            wrote any more; it refused, or can't be reached.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise KronyError(f"{repository!r} is no name of the Hub: {first_line(error)}") from error
    load_model(folder)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    files = {
        name: path
        for name, path in files.items()
        if path.is_file() and not any(part.startswith(".") for part in Path(name).parts)
    }
    sizes = {name: path.stat().st_size for name, path in files.items()}
    operations: list[Any] = [CommitOperationAdd(name, str(p)) for name, p in files.items()]
    if CARD not in sizes:
        content = str(made).encode()
        operations.append(CommitOperationAdd(CARD, content))
        sizes[CARD] = len(content)
    if dry:
        return sizes
    try:
        hub = HfApi()
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.create_commit(repository, operations, commit_message="Upload a model made by krony")
    except Exception as error:  # the network library's own kinds among them
        raise KronyError(
            f"can't push to {repository}: {first_line(error)}; check the name, the network and "
            "your token (hf auth login)"
        ) from error
    return sizes
