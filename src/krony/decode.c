/* The factored product for a few tokens on a CPU, one pass over the large factor; at the end, the
 * activation between two of them.
 *
 *     y = x W',   W = sum over r of B_r (x) A_r   (or A_r (x) B_r)
 *
 * A_r (m1, n1) large, B_r (m2, n2) small, x (tokens, n1*n2), y (tokens, m1*m2); the letters and both
 * layouts are those of kron.py. With mix_first the weight is (m1, terms*n1) and the small factors are
 * applied to the inputs, else it is (terms*m1, n1) and they are applied to the products.
 *
 * Plain C without headers of torch: cpu_kernels.py compiles it with the system's compiler in about a
 * second, once, for this very processor, and calls it through ctypes. Included twice by itself: NUMBER
 * is the type that tensors are stored in. Everything is summed in float32. The sums that make one
 * output have one order whatever the number of threads.
 */
#ifndef NUMBER

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 8 }; /* numbers in a register, and rows of w in one kernel call */
#elif defined(__AVX__)
enum { LANES = 8, ROWS = 4 };
#else
enum { LANES = 4, ROWS = 8 };
#endif
/* Rows of z in one kernel call; rows of w in a thread's piece of work; slices mixed together. */
enum { MOST = 3, CHUNK = 64, SLICES = 4 };
enum { SHARED = 1 << 15 }; /* numbers from which an element-wise loop is shared among threads */

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4)));
typedef float Four __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t Mask __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2)));

static inline float total(Vector v) { /* by quarters: few steps, none of them through memory */
    union {
        Vector all;
        Four four[LANES / 4];
    } parts = {v};
    Four sum = parts.four[0];
    for (int i = 1; i < LANES / 4; i++) sum += parts.four[i];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

/* Where the mask is set (all bits of a lane) `yes`, elsewhere `no`. */
static inline Words chosen(Mask where, Words yes, Words no) {
    return ((Words)where & yes) | (~(Words)where & no);
}
static inline Vector constant(float v) { return (Vector){0} + v; }

static inline Vector within(Vector v, float most) {
    v = (Vector)chosen(v < -most, (Words)constant(-most), (Words)v);
    return (Vector)chosen(v > most, (Words)constant(most), (Words)v);
}

/* e to the power of v, right to the last digits of float32; v is held within +-87. */
static inline Vector exponential(Vector v) {
    v = within(v, 87.0f);
    /* v = k log 2 + r; adding 1.5 * 2^23 rounds, and leaves k in the low bits. */
    Vector shifted = v * 1.44269504f + 12582912.0f, k = shifted - 12582912.0f;
    Vector r = v - k * 0.693359375f + k * 2.12194440e-4f;
    Vector sum = r * (1.0f / 5040) + (1.0f / 720); /* of the series, |r| < 0.35 */
    sum = sum * r + (1.0f / 120);
    sum = sum * r + (1.0f / 24);
    sum = sum * r + (1.0f / 6);
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    return sum * (Vector)(((Words)shifted << 23) + 0x3f800000u);
}

/* 1 + exp(-2 u), of which (1 + tanh(u)) / 2 is the inverse; u = sqrt(2 / pi) (v + 0.044715 v^3) */
static inline Vector gelu_divisor(Vector v) {
    return 1.0f + exponential(v * (-1.59576912f - 0.0713548163f * v * v));
}

static inline Vector gelu(Vector v) { return v / gelu_divisor(v); }

static inline Vector gelu_slope(Vector v) { /* s + v s (1 - s) 2 u', where s is that inverse */
    v = within(v, 32.0f); /* 0 or 1 beyond, and squares of v may be infinite */
    Vector s = 1.0f / gelu_divisor(v);
    return s + v * s * (1.0f - s) * (1.59576912f + 0.214064449f * v * v);
}

static inline float read_float(const float *p) { return *p; }
static inline Vector load_float(const float *p) { return *(const Vector *)p; }
static inline void write_float(float *p, float v) { *p = v; }
static inline void store_float(float *p, Vector v) { *(Vector *)p = v; }

static inline float read_bfloat16(const uint16_t *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
static inline Vector load_bfloat16(const uint16_t *p) {
    return (Vector)(__builtin_convertvector(*(const Halves *)p, Words) << 16);
}
static inline void write_bfloat16(uint16_t *p, float v) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &v, 4);
    *p = v == v ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}
static inline void store_bfloat16(uint16_t *p, Vector v) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
    return;
#endif
    Words bits = (Words)v, even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *(Halves *)p = __builtin_convertvector(chosen(v == v, even, (Words){0} + 0x7fc0), Halves);
}

#define NUMBER float
#define NAME(of) of##_float
#include "decode.c"
#undef NUMBER
#undef NAME
#define NUMBER uint16_t
#define NAME(of) of##_bfloat16
#include "decode.c"

#else

/* out[j * step + i] = w[i, :] . z[j, :] for `count` rows of w and `together` rows of z, which are
 * `pitch` apart. Both numbers are constants where this is called: all sums stay in registers. */
static inline __attribute__((always_inline)) void NAME(tile)(
    const NUMBER *w, int count, long width, const float *z, long pitch, int together, float *out,
    long step) {
    Vector sum[ROWS][MOST];
    for (int i = 0; i < count; i++)
        for (int j = 0; j < together; j++) sum[i][j] = (Vector){0};
    /* The rows are one stretch of memory, and so are those of the next call, wanted soon. */
    const char *soon = (const char *)(w + count * width);
    long k = 0;
    for (; k + LANES <= width; k += LANES) {
        Vector other[MOST];
        for (int j = 0; j < together; j++) other[j] = load_float(z + j * pitch + k);
        for (int i = 0; i < count; i++) {
            Vector row = NAME(load)(w + i * width + k);
            for (int j = 0; j < together; j++) sum[i][j] += row * other[j];
        }
        for (int line = 0; line < count * LANES * (int)sizeof(NUMBER); line += 64)
            __builtin_prefetch(soon + k * count * sizeof(NUMBER) + line);
    }
    for (int i = 0; i < count; i++)
        for (int j = 0; j < together; j++) out[j * step + i] = total(sum[i][j]);
    for (; k < width; k++)
        for (int i = 0; i < count; i++)
            for (int j = 0; j < together; j++)
                out[j * step + i] += NAME(read)(w + i * width + k) * z[j * pitch + k];
}

/* out[j * step + i] = w[i, :] . z[j, :] for all i < count and j < rows. */
static void NAME(products)(
    const NUMBER *w, long count, long width, const float *z, long pitch, long rows, float *out,
    long step) {
    for (long i = 0; i < count;) {
        const NUMBER *from = w + i * width;
        int full = i + ROWS <= count;
        for (long j = 0; j < rows;) {
            const float *with = z + j * pitch;
            float *to = out + j * step + i;
            long left = rows - j, together = left == 1 ? 1 : left == 2 || left == 4 ? 2 : 3;
            if (full && together == 3) NAME(tile)(from, ROWS, width, with, pitch, 3, to, step);
            if (full && together == 2) NAME(tile)(from, ROWS, width, with, pitch, 2, to, step);
            if (full && together == 1) NAME(tile)(from, ROWS, width, with, pitch, 1, to, step);
            if (!full && together == 3) NAME(tile)(from, 1, width, with, pitch, 3, to, step);
            if (!full && together == 2) NAME(tile)(from, 1, width, with, pitch, 2, to, step);
            if (!full && together == 1) NAME(tile)(from, 1, width, with, pitch, 1, to, step);
            j += together;
        }
        i += full ? ROWS : 1;
    }
}

/* out[i * pitch + a] = sum over r, d of b[r * entries + i * n2 + d] * p[r * apart + d * step + a] for
 * a < count and i < together, a constant where this is called. */
static inline __attribute__((always_inline)) void NAME(mix)(
    const float *b, long entries, long n2, long terms, const float *p, long apart, long step, long count,
    int together, float *out, long pitch) {
    long a = 0;
    for (; a + LANES <= count; a += LANES) {
        Vector sum[SLICES];
        for (int i = 0; i < together; i++) sum[i] = (Vector){0};
        for (long r = 0; r < terms; r++)
            for (long d = 0; d < n2; d++) {
                Vector of = load_float(p + r * apart + d * step + a);
                for (int i = 0; i < together; i++) sum[i] += b[r * entries + i * n2 + d] * of;
            }
        for (int i = 0; i < together; i++) *(Vector *)(out + i * pitch + a) = sum[i];
    }
    for (; a < count; a++)
        for (int i = 0; i < together; i++) {
            float sum = 0;
            for (long r = 0; r < terms; r++)
                for (long d = 0; d < n2; d++)
                    sum += b[r * entries + i * n2 + d] * p[r * apart + d * step + a];
            out[i * pitch + a] = sum;
        }
}

/* The same for `rows` slices, SLICES at a time. */
static void NAME(mixes)(
    const float *b, long entries, long n2, long terms, const float *p, long apart, long step, long count,
    long rows, float *out, long pitch) {
    for (long i = 0; i < rows;) {
        const float *of = b + i * n2;
        int together = i + SLICES <= rows ? SLICES : i + 2 <= rows ? 2 : 1;
        float *to = out + i * pitch;
        if (together == SLICES)
            NAME(mix)(of, entries, n2, terms, p, apart, step, count, SLICES, to, pitch);
        else if (together == 2)
            NAME(mix)(of, entries, n2, terms, p, apart, step, count, 2, to, pitch);
        else
            NAME(mix)(of, entries, n2, terms, p, apart, step, count, 1, to, pitch);
        i += together;
    }
}

/* Returns 0, or 1 where there is no memory for the intermediate results. `order` is NULL, or that of
 * the interpolative form (kron.interpolate): `small` holds the entries that are not of the unit
 * matrix, (terms, m2*n2 - terms), and entry e is column order[e] of the two beside each other. */
int NAME(decode)(const NUMBER *x, const NUMBER *small, const int32_t *order, const NUMBER *weight,
                 NUMBER *y, long tokens, long terms, long m1, long n1, long m2,
                 long n2, int small_outer, int mix_first, int threads) {
    long slices = mix_first ? m2 : n2; /* of a token, each a row that meets the weight */
    long rows = tokens * slices, width = mix_first ? terms * n1 : n1, n = n1 * n2;
    long made = mix_first ? 1 : terms; /* products of one chunk, a block of rows each */
    long kept = order ? terms : 0, entries = m2 * n2, given = entries - kept;
    /* Low rank: the "small" factors, a row a term, are a matrix like the large one. */
    int low_rank = mix_first && n1 == 1 && m2 == 1;
    long chunk = (m1 + threads - 1) / threads;
    chunk = chunk < CHUNK ? (chunk + LANES - 1) / LANES * LANES : CHUNK;
    long scratch = (rows * made + (mix_first ? 0 : m2)) * chunk, copied = low_rank ? 0 : terms * entries;
    float *memory = malloc(sizeof(float) * (tokens * n + copied + rows * width + threads * scratch));
    if (!memory) return 1;
    float *inputs = memory, *factors = inputs + tokens * n;
    float *mixed = factors + copied, *products = mixed + rows * width;
    for (long t = 0; t < tokens; t++) /* slices one after the other, (tokens, n2, n1) */
        for (long d = 0; d < n2; d++) {
            long to = low_rank && order ? order[d] : d;
            for (long b = 0; b < n1; b++) {
                long from = small_outer ? d * n1 + b : b * n2 + d;
                inputs[t * n + to * n1 + b] = NAME(read)(x + t * n + from);
            }
        }
    if (!low_rank)
        for (long r = 0; r < terms; r++)
            for (long e = 0; e < entries; e++) {
                long column = order ? order[e] : e;
                factors[r * entries + e] = column < kept
                    ? column == r : NAME(read)(small + r * given + column - kept);
            }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *mine = products;
#ifdef _OPENMP
        extern int omp_get_thread_num(void);
        mine += omp_get_thread_num() * scratch;
#endif
        if (low_rank) {
#pragma omp for schedule(static)
            for (long start = 0; start < terms; start += ROWS) {
                long count = start + ROWS <= terms ? ROWS : terms - start;
                for (long t = 0; t < tokens; t += MOST) {
                    float out[MOST * ROWS], *from = inputs + t * n;
                    long together = t + MOST <= tokens ? MOST : tokens - t;
                    NAME(products)(small + start * given, count, given, from + kept, n, together, out,
                                   ROWS);
                    for (long j = 0; j < together; j++)
                        for (long i = 0; i < count; i++)
                            mixed[(t + j) * terms + start + i] =
                                out[j * ROWS + i] + (kept ? from[j * n + start + i] : 0);
                }
            }
        } else if (mix_first) {
#pragma omp for schedule(static)
            for (long line = 0; line < tokens * terms; line++) {
                long t = line / terms, r = line % terms;
                NAME(mixes)(factors + r * entries, 0, n2, 1, inputs + t * n, 0, n1, n1, m2,
                            mixed + (t * m2 * terms + r) * n1, width);
            }
        }
        const float *z = mix_first ? mixed : inputs;
#pragma omp for schedule(static)
        for (long start = 0; start < m1; start += chunk) {
            long count = start + chunk <= m1 ? chunk : m1 - start;
            for (long r = 0; r < made; r++)
                NAME(products)(weight + (r * m1 + start) * width, count, width, z, width, rows,
                               mine + r * rows * chunk, chunk);
            for (long t = 0; t < tokens; t++) {
                float *slice = mine + t * slices * chunk; /* m2 of them, `chunk` apart */
                if (!mix_first) {
                    NAME(mixes)(factors, entries, n2, terms, slice, rows * chunk, chunk, count, m2,
                                mine + made * rows * chunk, chunk);
                    slice = mine + made * rows * chunk;
                }
                for (long c = 0; c < m2; c++)
                    for (long a = 0; a < count; a++) {
                        long at = small_outer ? c * m1 + start + a : (start + a) * m2 + c;
                        NAME(write)(y + t * m1 * m2 + at, slice[c * chunk + a]);
                    }
            }
        }
    }
    free(memory);
    return 0;
}

/* y[t, i, :] = bias[i, :] + sum over j of b[i, j] x[t, j, :], for i < together, a constant here. */
static inline __attribute__((always_inline)) void NAME(blend)(
    const float *b, long q, const NUMBER *x, long slice, const NUMBER *bias, NUMBER *y, long apart, long k,
    int together) {
    long a = 0;
    for (; a + LANES <= k; a += LANES) {
        Vector sum[SLICES];
        for (int i = 0; i < together; i++)
            sum[i] = bias ? NAME(load)(bias + i * k + a) : (Vector){0};
        for (long j = 0; j < q; j++) {
            Vector of = NAME(load)(x + j * slice + a);
            for (int i = 0; i < together; i++) sum[i] += b[i * q + j] * of;
        }
        for (int i = 0; i < together; i++) NAME(store)(y + i * apart + a, sum[i]);
    }
    for (; a < k; a++)
        for (int i = 0; i < together; i++) {
            float sum = bias ? NAME(read)(bias + i * k + a) : 0;
            for (long j = 0; j < q; j++) sum += b[i * q + j] * NAME(read)(x + j * slice + a);
            NAME(write)(y + i * apart + a, sum);
        }
}

/* The slices of many tokens mixed: x (tokens, q, k), b (p, q), bias (p, k) or NULL, y (tokens, p, k);
 * tokens and slices of x and y may lie any way, `x_token` and so on apart. */
void NAME(mix_many)(const NUMBER *x, const float *b, const NUMBER *bias, NUMBER *y, long tokens, long p,
                    long q, long k, long x_token, long x_slice, long y_token, long y_slice, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && tokens * p * k >= SHARED)
    for (long t = 0; t < tokens; t++) {
        const NUMBER *from = x + t * x_token, *add = bias;
        for (long i = 0; i < p;) {
            NUMBER *to = y + t * y_token + i * y_slice;
            int together = i + SLICES <= p ? SLICES : p - i;
            if (together == 4) NAME(blend)(b + i * q, q, from, x_slice, add, to, y_slice, k, 4);
            if (together == 3) NAME(blend)(b + i * q, q, from, x_slice, add, to, y_slice, k, 3);
            if (together == 2) NAME(blend)(b + i * q, q, from, x_slice, add, to, y_slice, k, 2);
            if (together == 1) NAME(blend)(b + i * q, q, from, x_slice, add, to, y_slice, k, 1);
            i += together;
            if (add) add += together * k;
        }
    }
}

/* y = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) for `count` numbers, or where there are
 * gradients of that, y = those of x. */
void NAME(gelu)(const NUMBER *x, const NUMBER *gradient, NUMBER *y, long count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count >= SHARED)
    for (long i = 0; i < count; i += LANES) {
        long here = count - i < LANES ? count - i : LANES;
        NUMBER last[2][LANES] = {{0}};
        const NUMBER *from = x + i, *slopes = gradient ? gradient + i : NULL;
        NUMBER *to = y + i;
        if (here < LANES) { /* not to read or write beyond the end */
            memcpy(last[0], from, here * sizeof(NUMBER));
            if (slopes) memcpy(last[1], slopes, here * sizeof(NUMBER));
            from = to = last[0];
            slopes = slopes ? last[1] : NULL;
        }
        Vector v = NAME(load)(from);
        NAME(store)(to, slopes ? NAME(load)(slopes) * gelu_slope(v) : gelu(v));
        if (here < LANES) memcpy(y + i, to, here * sizeof(NUMBER));
    }
}

#endif
