"""Mixing many tokens with a small factor on its own: a product for every token, or all together.

What `krony.nn.products` chooses between on a GPU, forwards and backwards, beside a copy of the same
numbers, which is as fast as a memory-bound operation can be.

python benchmarks/mixing.py [--tokens 128 1024 16384] [--dtype bfloat16]
"""

import torch
from torch import Tensor

from krony.hf.checkpoints import DTYPES
from krony.nn import products
from records import Record, parser
from timing import device_here, rounds

# (p, q, k): slices out, slices in, their length: of the paper's schemes at GPT-2's widths, of four
# terms with 3 x 3, and of small factors beyond what is taken by element.
SIZES = [(2, 2, 384), (4, 1, 768), (1, 4, 768), (12, 3, 256), (16, 16, 96)]


def by_token(mixing: Tensor, x: Tensor) -> Tensor:
    """A tiny product for every token."""
    return torch.bmm(mixing.expand(len(x), -1, -1), x)


def main() -> None:
    """Measure, print, write."""
    made = parser(__doc__ or "", "mixing")
    made.add_argument("--tokens", type=int, nargs="+", default=[128, 1024, 16_384])
    made.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    made.add_argument("--seconds", type=float, default=0.3, help="for each row")
    options = made.parse_args()
    if options.small:
        options.tokens, options.seconds = [16], 0.0
    device, dtype = device_here(), DTYPES[options.dtype]
    record = Record("mixing many tokens with a small factor", options)
    for p, q, k in SIZES:
        for tokens in options.tokens:
            if not record.has_time(f"({p}, {q}) x {k}, {tokens} tokens", 4 * options.seconds):
                continue
            inputs = [
                torch.randn(p, q, device=device, dtype=dtype, requires_grad=True),
                torch.randn(tokens, q, k, device=device, dtype=dtype, requires_grad=True),
            ]
            gradient = torch.randn(tokens, p, k, device=device, dtype=dtype)

            def forwards(way, inputs=inputs):  # type: ignore[no-untyped-def]
                with torch.no_grad():
                    return way(*inputs)

            def both(way, inputs=inputs, gradient=gradient):  # type: ignore[no-untyped-def]
                return torch.autograd.grad(way(*inputs), inputs, gradient)

            jobs = {
                "copy": lambda inputs=inputs: inputs[1].detach().clone(),
                "a product a token": lambda f=forwards: f(by_token),
                "all together": lambda f=forwards: f(products.mix_all),
                "a product a token, and back": lambda b=both: b(by_token),
                "all together, and back": lambda b=both: b(products.mix_all),
            }
            taken = rounds(jobs, device, options.seconds)
            found = {n: round(1e6 * sorted(t)[len(t) // 2], 2) for n, t in taken.items()}
            record.add({"mixing": [p, q], "slice": k, "tokens": tokens, "microseconds": found})
            print(f"({p}, {q}) x {k}, {tokens} tokens, µs:", found, flush=True)


if __name__ == "__main__":
    main()
