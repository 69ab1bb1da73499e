/* What is element by element in a factored MLP, for many tokens on a CPU: slices mixed by a small
 * factor, bias and activation, in one pass over memory where torch takes one for each; and small
 * factors in full.
 */
#ifndef NUMBER
#include "vectors.h"

enum { MOST_SLICES = 64 }; /* of the hidden axis, held near by: cpu_kernels.MOST_MIXED */

/* Of one matrix that writes the hidden axis, the product x (tokens, q, k) with its large factor;
 * tokens and slices lie `token` and `slice` apart. b (slices, q) mixes them; NULL: they stay. */
typedef struct {
    const void *x;
    const float *b;
    const void *bias; /* (slices, k), or NULL */
    long q, token, slice;
} Written;

#define NUMBER float
#define PRECISE 1
#define NAME(of) of##_float
#include "hidden.c"
#undef NUMBER
#undef PRECISE
#undef NAME
#define NUMBER uint16_t
#define PRECISE 0
#define NAME(of) of##_bfloat16
#include "hidden.c"

#else

/* LANES numbers, or where not `full`, a constant where this is called, the last `left` and zeros. */
static inline __attribute__((always_inline)) Vector NAME(take)(const NUMBER *p, int full, long left) {
    if (full) return NAME(load)(p);
    NUMBER some[LANES] = {0};
    memcpy(some, p, left * sizeof(NUMBER));
    return NAME(load)(some);
}
static inline __attribute__((always_inline)) void NAME(give)(NUMBER *p, Vector v, int full, long left) {
    if (full) {
        NAME(store)(p, v);
    } else {
        NUMBER some[LANES];
        NAME(store)(some, v);
        memcpy(p, some, left * sizeof(NUMBER));
    }
}

/* h[i] = bias[i] + sum over j of b[i, j] x[j] for a stretch of k of one token and slices from `i` to
 * `i` + together, a constant where this is called: the sums stay in registers. */
static inline __attribute__((always_inline)) void NAME(blend)(
    const Written *of, long t, long a, long k, long i, int together, Vector *h, int full) {
    const NUMBER *x = (const NUMBER *)of->x + t * of->token + a;
    Vector sum[SLICES];
    for (int c = 0; c < together; c++)
        sum[c] = of->bias ? NAME(take)((const NUMBER *)of->bias + (i + c) * k + a, full, k - a) : (Vector){0};
    if (!of->b)
        for (int c = 0; c < together; c++) sum[c] += NAME(take)(x + (i + c) * of->slice, full, k - a);
    else
        for (long j = 0; j < of->q; j++) {
            Vector from = NAME(take)(x + j * of->slice, full, k - a);
            for (int c = 0; c < together; c++) sum[c] += of->b[(i + c) * of->q + j] * from;
        }
    for (int c = 0; c < together; c++) h[i + c] = sum[c];
}

static inline __attribute__((always_inline)) void NAME(blends)(
    const Written *of, long t, long a, long k, long slices, Vector *h, int full) {
    long i = 0;
    for (; i + SLICES <= slices; i += SLICES) NAME(blend)(of, t, a, k, i, SLICES, h, full);
    if (slices - i == 3) NAME(blend)(of, t, a, k, i, 3, h, full);
    if (slices - i == 2) NAME(blend)(of, t, a, k, i, 2, h, full);
    if (slices - i == 1) NAME(blend)(of, t, a, k, i, 1, h, full);
}

static inline __attribute__((always_inline)) void NAME(stretch)(
    const Written *gate, const Written *other, int activation, const float *b, NUMBER *y, long t, long a,
    long k, long slices, long p, long y_slice, int full) {
    Vector h[MOST_SLICES], beside[MOST_SLICES];
    NAME(blends)(gate, t, a, k, slices, h, full);
    for (long i = 0; i < slices; i++) h[i] = activated(h[i], activation, PRECISE);
    if (other) {
        NAME(blends)(other, t, a, k, slices, beside, full);
        for (long i = 0; i < slices; i++) h[i] *= beside[i];
    }
    if (!b)
        for (long i = 0; i < slices; i++) NAME(give)(y + i * y_slice + a, h[i], full, k - a);
    else
        for (long i = 0; i < p; i++) {
            Vector sum = (Vector){0};
            for (long j = 0; j < slices; j++) sum += b[i * slices + j] * h[j];
            NAME(give)(y + i * y_slice + a, sum, full, k - a);
        }
}

/* The hidden axis of an MLP, from what writes it to what reads it, without being written itself:
 * h (tokens, slices, k) is the activation of what `gate` gives, times what `other` gives where there
 * is one; y (tokens, p, k) is b (p, slices) times h, or h itself where b is NULL. */
void NAME(hidden)(const Written *gate, const Written *other, int activation, const float *b, NUMBER *y,
                  long tokens, long k, long slices, long p, long y_token, long y_slice, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && tokens * slices * k >= SHARED)
    for (long t = 0; t < tokens; t++) {
        NUMBER *to = y + t * y_token;
        long a = 0;
        /* The constants let the compiler leave out what is not asked for, and keep few slices in registers. */
#define STRETCHES(OTHER, ACTIVATION, B, COUNT)                                                        \
    for (; a + LANES <= k; a += LANES)                                                                \
        NAME(stretch)(gate, OTHER, ACTIVATION, B, to, t, a, k, COUNT, p, y_slice, 1);
#define BY_SLICES(OTHER, ACTIVATION, B)                                                               \
    {                                                                                                 \
        if (slices == 1) STRETCHES(OTHER, ACTIVATION, B, 1)                                           \
        if (slices == 2) STRETCHES(OTHER, ACTIVATION, B, 2)                                           \
        if (slices == 4) STRETCHES(OTHER, ACTIVATION, B, 4)                                           \
        STRETCHES(OTHER, ACTIVATION, B, slices)                                                       \
    }
        if (!other && activation == TANH_GELU && b) BY_SLICES(NULL, TANH_GELU, b)
        if (!other && activation == TANH_GELU && !b) BY_SLICES(NULL, TANH_GELU, NULL)
        if (!other && activation == NONE && !b) BY_SLICES(NULL, NONE, NULL)
        if (other && activation == SILU && b) BY_SLICES(other, SILU, b)
        if (other && activation == SILU && !b) BY_SLICES(other, SILU, NULL)
        STRETCHES(other, activation, b, slices)
#undef BY_SLICES
#undef STRETCHES
        if (a < k) NAME(stretch)(gate, other, activation, b, to, t, a, k, slices, p, y_slice, 0);
    }
}

/* TANH_GELU of `count` numbers, or where there are gradients of that, those of x. */
void NAME(gelu)(const NUMBER *x, const NUMBER *gradient, NUMBER *y, long count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count >= SHARED)
    for (long i = 0; i < count; i += LANES) {
        int full = i + LANES <= count;
        Vector v = NAME(take)(x + i, full, count - i);
        if (gradient) v = NAME(take)(gradient + i, full, count - i) * gelu_slope(v);
        else v = activated(v, TANH_GELU, 1);
        NAME(give)(y + i, v, full, count - i);
    }
}

/* Small factors of the interpolative form in full: `small` and `order` are those of decode.c's Group,
 * out (terms, entries). */
void NAME(fill)(const NUMBER *small, const int32_t *order, NUMBER *out, long terms, long entries, int threads) {
    long given = entries - terms, last = -1;
    int ascending = 1; /* what is given comes in its own order, as kron.interpolate makes it */
    for (long e = 0; e < entries; e++)
        if (order[e] >= terms) ascending &= order[e] - terms == last + 1, last = order[e] - terms;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && terms * entries >= SHARED)
    for (long r = 0; r < terms; r++) {
        const NUMBER *from = small + r * given;
        NUMBER *to = out + r * entries;
        long e = 0;
#ifdef __AVX512F__
        for (long next = 0; ascending && e + LANES <= entries; e += LANES) {
            __mmask16 here = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(order + e), _mm512_set1_epi32(terms));
            Vector some = NAME(take)(from + next, next + LANES <= given, given - next);
            NAME(store)(to + e, (Vector)_mm512_maskz_expand_ps(here, (__m512)some));
            next += __builtin_popcount(here);
        }
#endif
        for (; e < entries; e++)
            NAME(write)(to + e, order[e] < terms ? 0 : NAME(read)(from + order[e] - terms));
    }
    for (long e = 0; e < entries; e++)
        if (order[e] < terms) NAME(write)(out + order[e] * entries + e, 1);
}

#endif
