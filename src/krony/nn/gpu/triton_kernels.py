"""Triton kernels of factored matrices and MLPs on a GPU: what a program computes.

Imported only where Triton is, by `launch.py`, which chooses their blocks.

One launch takes tokens through one matrix, or through the two that write a gated hidden axis, and
all that is element by element around it:

    p[t,d,a] = Σ_b A[r,a,b] x[t,d,b]               the large product, for each slice d of the inputs
    h[t,c,a] = Σ_r Σ_d B[r,c,d] p[t,d,r,a] + bias  the small one, of its results
    h        = activation(h), times another h where there is a gate
    y[t,e,a] = Σ_c C[e,c] h[t,c,a]                 what the next matrix mixes before its own product

Each entry of A is read once for all tokens of a program, and nothing but y is written: an MLP is
two launches, and its hidden axis never reaches memory. Letters as in kron.py; t counts tokens, a
rows and b columns of A, c rows and d columns of B. Sums are in float32.
"""

import triton
import triton.language as tl

# Of float32 tiles: three products of the matrix units, which have eleven bits, make about as many
# digits as one product of float32 has.
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _activation(h, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """As cpu_kernels numbers them. The GELU's (1 + tanh u) / 2 is the sigmoid of 2u."""
    if KIND == 1:
        h = h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    elif KIND == 2:
        h = h * tl.sigmoid(h)
    return h


@triton.jit
def _blocks(mixing, out_t, out_slice, in_t, in_slice, slices_in):  # type: ignore[no-untyped-def]
    """mixing (c, d), a block of it for each token, as a matrix of rows (t, c) by rows (t, d)."""
    place = out_slice[:, None] * slices_in + in_slice[None, :]
    found = tl.load(mixing + place, out_t[:, None] == in_t[None, :], other=0.0)
    return found.to(tl.float32)


@triton.jit
def _times(matrix, p, DOT: tl.constexpr):  # type: ignore[no-untyped-def]
    """matrix [OUT, IN] times p [IN, BLOCK_A]."""
    if DOT:
        made = tl.dot(matrix, p, input_precision="ieee")
    else:
        made = tl.sum(matrix[:, :, None] * p[None, :, :], 1)
    return made


@triton.jit
def _few_products(  # type: ignore[no-untyped-def]
    x, weight, small, bias, a, in_t, in_d, out_t, out_c, tokens, m1, n1, m2, n2, x_b, x_d, y_a, y_c,
    w_a, w_r, TERMS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr, DOT: tl.constexpr, DOT_IN: tl.constexpr, MIXED: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """h of one matrix before the activation: rows (t, c), [OUT, BLOCK_A]."""
    given = in_t < tokens
    x_row = in_t.to(tl.int64) * (n1 * n2) + in_d * x_d
    h = tl.zeros([OUT, BLOCK_A], dtype=tl.float32)
    if BIAS:  # what is read late is waited for
        offset = bias + (a * y_a)[None, :] + (out_c * y_c)[:, None]
        h += tl.load(offset, (a < m1)[None, :], other=0.0).to(tl.float32)
    for r in range(TERMS):
        w_row = a.to(tl.int64) * w_a + r * w_r
        if MIXED:
            mixing = _blocks(small + r * m2 * n2, out_t, out_c, in_t, in_d, n2)
        if DOT:
            p = tl.zeros([IN, BLOCK_A], dtype=tl.float32)
        else:
            p = tl.zeros([IN, BLOCK_A, BLOCK_B], dtype=tl.float32)
        for start in range(0, n1, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            within = (a < m1)[:, None] & (b < n1)[None, :]
            tile = tl.load(weight + w_row[:, None] + b[None, :], within, other=0.0)
            part = tl.load(
                x + x_row[:, None] + (b * x_b)[None, :],
                given[:, None] & (b < n1)[None, :],
                other=0.0,
            )
            if DOT:
                p = tl.dot(part.to(DOT_IN), tl.trans(tile.to(DOT_IN)), p, input_precision=PRECISION)
            else:
                p += part.to(tl.float32)[:, None, :] * tile.to(tl.float32)[None, :, :]
        if not DOT:
            p = tl.sum(p, 2)
        if MIXED:
            h += _times(mixing, p, DOT)
        else:
            h += p
    return h


@triton.jit
def few(  # type: ignore[no-untyped-def]
    x, weight, small, bias, weight_2, small_2, bias_2, inner, y,
    tokens, m1, n1, m2, n2, q, x_b, x_d, h_a, h_c, y_a, y_e, w_a, w_r,
    TERMS: tl.constexpr, BLOCK_T: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    LAST: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, DOT: tl.constexpr,
    DOT_IN: tl.constexpr, MIXED: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
    KIND: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Few tokens: all slices of a block of them are rows of one tile, and small factors are
    matrices with a block for each token."""
    a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    first = tl.program_id(1) * BLOCK_T
    source, row = tl.arange(0, IN), tl.arange(0, OUT)
    # Rows beyond the block's tokens belong to no token at all.
    in_d, in_t = source % n2, source // n2
    in_t = tl.where(in_t < BLOCK_T, first + in_t, tokens)
    out_c, out_t = row % m2, row // m2
    out_t = tl.where(out_t < BLOCK_T, first + out_t, tokens)
    if INNER:
        last = tl.arange(0, LAST)
        last_e, last_t = last % q, last // q
        last_t = tl.where(last_t < BLOCK_T, first + last_t, tokens)
        inner_mixing = _blocks(inner, last_t, last_e, out_t, out_c, m2)
    else:
        last_e, last_t = out_c, out_t
    h = _few_products(
        x, weight, small, bias, a, in_t, in_d, out_t, out_c, tokens, m1, n1, m2, n2, x_b, x_d, h_a,
        h_c, w_a, w_r, TERMS, IN, OUT, BLOCK_A, BLOCK_B, DOT, DOT_IN, MIXED, BIAS,
    )  # fmt: skip
    h = _activation(h, KIND)
    if GATED:
        h *= _few_products(
            x, weight_2, small_2, bias_2, a, in_t, in_d, out_t, out_c, tokens, m1, n1, m2, n2, x_b,
            x_d, h_a, h_c, w_a, w_r, TERMS, IN, OUT, BLOCK_A, BLOCK_B, DOT, DOT_IN, MIXED, BIAS,
        )  # fmt: skip
    if INNER:
        h = _times(inner_mixing, h, DOT)
    place = (last_t.to(tl.int64) * (m1 * q))[:, None] + (a * y_a)[None, :] + (last_e * y_e)[:, None]
    tl.store(y + place, h.to(y.dtype.element_ty), (last_t < tokens)[:, None] & (a < m1)[None, :])


@triton.jit
def _row(matrix, start, THERE: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """N numbers of a small matrix, four at most; zeros where there are none."""
    w0, w1, w2, w3 = 0.0, 0.0, 0.0, 0.0
    if THERE:
        w0 = tl.load(matrix + start).to(tl.float32)
        if N > 1:
            w1 = tl.load(matrix + start + 1).to(tl.float32)
        if N > 2:
            w2 = tl.load(matrix + start + 2).to(tl.float32)
        if N > 3:
            w3 = tl.load(matrix + start + 3).to(tl.float32)
    return w0, w1, w2, w3


@triton.jit
def _rows(matrix, THERE: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """A small matrix (M, N) by rows."""
    w0 = _row(matrix, 0, THERE, N)
    w1 = _row(matrix, N, THERE and M > 1, N)
    w2 = _row(matrix, 2 * N, THERE and M > 2, N)
    w3 = _row(matrix, 3 * N, THERE and M > 3, N)
    return w0, w1, w2, w3


@triton.jit
def _sum(w, p0, p1, p2, p3, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Σ_d w_d p_d over N of them."""
    h = w[0] * p0
    if N > 1:
        h += w[1] * p1
    if N > 2:
        h += w[2] * p2
    if N > 3:
        h += w[3] * p3
    return h


@triton.jit
def _combined(  # type: ignore[no-untyped-def]
    w, p0, p1, p2, p3, M: tl.constexpr, N: tl.constexpr
):
    """A small matrix (M, N), by rows, times N slices: M slices, and more of no meaning."""
    h0 = _sum(w[0], p0, p1, p2, p3, N)
    h1, h2, h3 = h0, h0, h0
    if M > 1:
        h1 = _sum(w[1], p0, p1, p2, p3, N)
    if M > 2:
        h2 = _sum(w[2], p0, p1, p2, p3, N)
    if M > 3:
        h3 = _sum(w[3], p0, p1, p2, p3, N)
    return h0, h1, h2, h3


@triton.jit
def _slice_products(  # type: ignore[no-untyped-def]
    x, weight, t, a, tokens, m1, n1, w_a, N2: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, DOT_IN: tl.constexpr,
):  # fmt: skip
    """p of one term and up to four slices, [BLOCK_T, BLOCK_A] each."""
    p0 = tl.zeros([BLOCK_T, BLOCK_A], dtype=tl.float32)
    p1, p2, p3 = p0, p0, p0
    rows = x + (t.to(tl.int64) * (n1 * N2))[:, None]
    for start in range(0, n1, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        within = (a < m1)[None, :] & (b < n1)[:, None]
        given = (t < tokens)[:, None] & (b < n1)[None, :]
        place = weight + (a.to(tl.int64) * w_a)[None, :] + b[:, None]
        tile = tl.load(place, within, other=0.0).to(DOT_IN)
        part = rows + b[None, :]
        x0 = tl.load(part, given, other=0.0).to(DOT_IN)
        p0 = tl.dot(x0, tile, p0, input_precision=PRECISION)
        if N2 > 1:
            x1 = tl.load(part + n1, given, other=0.0).to(DOT_IN)
            p1 = tl.dot(x1, tile, p1, input_precision=PRECISION)
        if N2 > 2:
            x2 = tl.load(part + 2 * n1, given, other=0.0).to(DOT_IN)
            p2 = tl.dot(x2, tile, p2, input_precision=PRECISION)
        if N2 > 3:
            x3 = tl.load(part + 3 * n1, given, other=0.0).to(DOT_IN)
            p3 = tl.dot(x3, tile, p3, input_precision=PRECISION)
    return p0, p1, p2, p3


@triton.jit
def _many_products(  # type: ignore[no-untyped-def]
    x, weight, small, t, a, tokens, m1, n1, w_a, w_r, TERMS: tl.constexpr, N2: tl.constexpr,
    M2: tl.constexpr, MIXED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr, DOT_IN: tl.constexpr,
):  # fmt: skip
    """h of one matrix before bias and activation: up to four slices, [BLOCK_T, BLOCK_A] each."""
    w = _rows(small, MIXED, M2, N2)  # what is read late is waited for
    h0, h1, h2, h3 = _slice_products(
        x, weight, t, a, tokens, m1, n1, w_a, N2, BLOCK_T, BLOCK_A, BLOCK_B, DOT_IN
    )
    if MIXED:
        h0, h1, h2, h3 = _combined(w, h0, h1, h2, h3, M2, N2)
    for r in range(1, TERMS):
        w = _rows(small + r * M2 * N2, MIXED, M2, N2)
        p0, p1, p2, p3 = _slice_products(
            x, weight + r * w_r, t, a, tokens, m1, n1, w_a, N2, BLOCK_T, BLOCK_A, BLOCK_B, DOT_IN
        )
        p0, p1, p2, p3 = _combined(w, p0, p1, p2, p3, M2, N2)
        h0 += p0
        h1 += p1
        h2 += p2
        h3 += p3
    return h0, h1, h2, h3


@triton.jit
def _offsets(bias, a, m1, BIAS: tl.constexpr, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Biases of up to four slices, (1, BLOCK_A) each."""
    o0, o1, o2, o3 = 0.0, 0.0, 0.0, 0.0
    if BIAS:
        o0 = tl.load(bias + a, a < m1, other=0.0).to(tl.float32)[None, :]
        if M > 1:
            o1 = tl.load(bias + m1 + a, a < m1, other=0.0).to(tl.float32)[None, :]
        if M > 2:
            o2 = tl.load(bias + 2 * m1 + a, a < m1, other=0.0).to(tl.float32)[None, :]
        if M > 3:
            o3 = tl.load(bias + 3 * m1 + a, a < m1, other=0.0).to(tl.float32)[None, :]
    return o0, o1, o2, o3


@triton.jit
def many(  # type: ignore[no-untyped-def]
    x, weight, small, bias, weight_2, small_2, bias_2, inner, y, tokens, m1, n1, w_a, w_r,
    TERMS: tl.constexpr, N2: tl.constexpr, M2: tl.constexpr, Q: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, DOT_IN: tl.constexpr,
    MIXED: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, KIND: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """Many tokens, slices that lie apart: each slice is a tile of its own."""
    # Programs that share inputs or weights run side by side, and find them in the cache.
    across, down = tl.cdiv(m1, BLOCK_A), tl.cdiv(tokens, BLOCK_T)
    number = tl.program_id(0)
    group = number // (8 * across)
    height = tl.minimum(down - group * 8, 8)
    t = (group * 8 + number % height) * BLOCK_T + tl.arange(0, BLOCK_T)
    a = (number % (8 * across)) // height * BLOCK_A + tl.arange(0, BLOCK_A)
    weights = _rows(inner, INNER, Q, M2)
    offsets = _offsets(bias, a, m1, BIAS, M2)
    offsets_2 = _offsets(bias_2, a, m1, BIAS and GATED, M2)
    p = _many_products(
        x, weight, small, t, a, tokens, m1, n1, w_a, w_r, TERMS, N2, M2, MIXED, BLOCK_T, BLOCK_A,
        BLOCK_B, DOT_IN,
    )  # fmt: skip
    g = p
    if GATED:
        g = _many_products(
            x, weight_2, small_2, t, a, tokens, m1, n1, w_a, w_r, TERMS, N2, M2, MIXED, BLOCK_T,
            BLOCK_A, BLOCK_B, DOT_IN,
        )  # fmt: skip
    here = (t < tokens)[:, None] & (a < m1)[None, :]
    places = y + (t.to(tl.int64) * (m1 * Q))[:, None] + a[None, :]
    z0 = tl.zeros([BLOCK_T, BLOCK_A], dtype=tl.float32)
    z1, z2, z3 = z0, z0, z0
    for c in tl.static_range(M2):
        h = _activation(p[c] + offsets[c], KIND)
        if GATED:
            h *= g[c] + offsets_2[c]
        if INNER:
            z0 += weights[0][c] * h
            if Q > 1:
                z1 += weights[1][c] * h
            if Q > 2:
                z2 += weights[2][c] * h
            if Q > 3:
                z3 += weights[3][c] * h
        else:
            tl.store(places + c * m1, h.to(y.dtype.element_ty), here)
    if INNER:
        tl.store(places, z0.to(y.dtype.element_ty), here)
        if Q > 1:
            tl.store(places + m1, z1.to(y.dtype.element_ty), here)
        if Q > 2:
            tl.store(places + 2 * m1, z2.to(y.dtype.element_ty), here)
        if Q > 3:
            tl.store(places + 3 * m1, z3.to(y.dtype.element_ty), here)
