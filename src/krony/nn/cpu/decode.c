/* Factored layers and MLPs for a few tokens on a CPU, one pass over the large factors.
 *
 *     y = x W' + bias,   W = sum over groups and r of B_r (x) A_r   (or A_r (x) B_r)
 *
 * A_r (m1, n1) large, B_r (m2, n2) small, x (tokens, n1*n2), y (tokens, m1*m2); the letters and both
 * layouts are those of kron.py. With mix_first the weight is (m1, terms*n1) and the small factors are
 * applied to the inputs, else it is (terms*m1, n1) and they are applied to the products. The sums that
 * make one output have one order whatever the number of threads.
 */
#ifndef NUMBER
#include "vectors.h"

enum { MOST = 3 };    /* rows of z in one kernel call */
enum { CHUNK = 256 }; /* rows of w in a thread's piece of work, at most */
enum { AHEAD = 512 }; /* bytes: far enough to come in time, near enough to be there still */

/* `order` is NULL, or that of the interpolative form (kron.interpolate): `small` holds the entries that
 * are not of the unit matrix, (terms, m2*n2 - terms), and entry e is column order[e] of the two beside
 * each other. `scalars` (terms) or NULL. A `small` of NULL is a one: a matrix that is not factored, the
 * weight (m1, n1), or `by_columns` (n1, m1). */
typedef struct {
    const void *small, *scalars, *weight;
    const int32_t *order;
    long terms, m1, n1, m2, n2;
    int small_outer, mix_first, by_columns;
} Group;

typedef struct {
    const Group *groups;
    long count;
    const void *bias; /* (m), or NULL */
    long m, n;
} Matrix;

static long longest(long a, long b) { return a > b ? a : b; }

/* Rows of a weight that a thread takes at a time: all of its share or equal parts of that. */
static long piece(long rows, int threads, long most) {
    long share = (rows + threads - 1) / threads, parts = (share + most - 1) / most;
    long size = (share + parts - 1) / parts;
    return (size + ROWS - 1) / ROWS * ROWS;
}

/* Slices of a token, each a row that meets the weight, and products of one piece, a block of rows each. */
static long slices(const Group *g) { return g->mix_first ? g->m2 : g->n2; }
static long made(const Group *g) { return g->mix_first ? 1 : g->terms; }
static long width(const Group *g) { return g->mix_first ? g->terms * g->n1 : g->n1; }
/* Low rank: the "small" factors, a row a term, are a matrix like the large one. */
static int low_rank(const Group *g) { return g->small && g->mix_first && g->n1 == 1 && g->m2 == 1; }

/* Outputs of one piece: columns are read as far as they go. */
static long chunk_of(const Group *g, int threads) {
    return piece(g->m1, threads, g->by_columns ? g->m1 : CHUNK);
}

/* Of one thread. */
static long scratch(const Group *g, long tokens, int threads) {
    long lines = tokens * slices(g) * made(g) + (g->mix_first ? 0 : g->m2);
    return longest(lines * chunk_of(g, threads), low_rank(g) ? tokens * piece(g->terms, threads, CHUNK) : 0);
}

/* Floats that `add` needs for any group of a matrix: inputs, factors, mixed slices, products. */
static long needed(const Matrix *matrix, long tokens, int threads) {
    long most = 0;
    for (long i = 0; i < matrix->count; i++) {
        const Group *g = matrix->groups + i;
        long factors = low_rank(g) ? g->terms : g->terms * g->m2 * g->n2;
        most = longest(most, tokens * g->n1 * g->n2 + factors + tokens * slices(g) * width(g) +
                                 threads * scratch(g, tokens, threads));
    }
    return most;
}

#define NUMBER float
#define PRECISE 1
#define NAME(of) of##_float
#include "decode.c"
#undef NUMBER
#undef PRECISE
#undef NAME
#define NUMBER uint16_t
#define PRECISE 0
#define NAME(of) of##_bfloat16
#include "decode.c"

#else

/* out[j * step + i * span] = w[i * span, :] . z[j, :] for `count` rows of w, `span` rows apart, and
 * `together` rows of z, `pitch` numbers apart. Both numbers are constants where this is called: all
 * sums stay in registers. With `fetch` what comes next in each of the rows is asked for. */
static inline __attribute__((always_inline)) void NAME(tile)(
    const NUMBER *w, int count, long span, long width, const float *z, long pitch, int together,
    int fetch, float *out, long step) {
    Vector sum[ROWS][MOST];
    for (int i = 0; i < count; i++)
        for (int j = 0; j < together; j++) sum[i][j] = (Vector){0};
    long k = 0;
    for (; k + LANES <= width; k += LANES) {
        Vector other[MOST];
        for (int j = 0; j < together; j++) other[j] = load_float(z + j * pitch + k);
        for (int i = 0; i < count; i++) {
            const NUMBER *from = w + i * span * width + k;
            Vector row = NAME(load)(from);
            for (int j = 0; j < together; j++) sum[i][j] += row * other[j];
            if (fetch) __builtin_prefetch((const char *)from + AHEAD, 0, 2);
        }
    }
    for (int i = 0; i < count; i++)
        for (int j = 0; j < together; j++) out[j * step + i * span] = total(sum[i][j]);
    for (; k < width; k++)
        for (int i = 0; i < count; i++)
            for (int j = 0; j < together; j++)
                out[j * step + i * span] = fused(
                    NAME(read)(w + i * span * width + k), z[j * pitch + k], out[j * step + i * span]);
}

/* out[j * step + i] = w[i, :] . z[j, :] for all i < count and j < rows. ROWS streams, each a part of
 * w from its start to its end, are what the processor foresees best. */
static void NAME(products)(
    const NUMBER *w, long count, long width, const float *z, long pitch, long rows, float *out,
    long step) {
    long span = count / ROWS, whole = span * ROWS;
    for (long i = 0; i < count; i = i + 1 == span ? whole : i + 1) {
        const NUMBER *from = w + i * width;
        int full = i < span;
        for (long j = 0; j < rows;) {
            const float *with = z + j * pitch;
            float *to = out + j * step + i;
            long left = rows - j, together = left == 1 ? 1 : left == 2 || left == 4 ? 2 : 3;
#define TILE(COUNT, TOGETHER, FETCH)                                                                  \
    if (full == (COUNT > 1) && together == TOGETHER && (j == 0) == FETCH)                             \
        NAME(tile)(from, COUNT, span, width, with, pitch, TOGETHER, FETCH, to, step);
            TILE(ROWS, 3, 1) TILE(ROWS, 2, 1) TILE(ROWS, 1, 1)
            TILE(ROWS, 3, 0) TILE(ROWS, 2, 0) TILE(ROWS, 1, 0)
            TILE(1, 3, 1) TILE(1, 2, 1) TILE(1, 1, 1)
            TILE(1, 3, 0) TILE(1, 2, 0) TILE(1, 1, 0)
#undef TILE
            j += together;
        }
    }
}

/* out[j * step + i] = sum over k of z[j, k] w[k, i], w (width, m), for all i < count and j < rows: ROWS
 * streams here too, each a part of w's rows, and what they add to is near by. */
static void NAME(sums)(
    const NUMBER *w, long m, long count, long width, const float *z, long pitch, long rows, float *out,
    long step) {
    long span = width / ROWS;
    memset(out, 0, sizeof(float) * rows * step);
    for (long k = 0; k < width - span * (ROWS - 1); k++)
        for (long j = 0; j < rows; j++) {
            const float *by = z + j * pitch;
            float *to = out + j * step, factor[ROWS];
            int streams = k < span ? ROWS : 1; /* at the end, the rows that the parts leave */
            long first = k < span ? k : k + span * (ROWS - 1);
            const NUMBER *from = w + first * m;
            for (int i = 0; i < streams; i++) factor[i] = by[first + i * span];
            long a = 0;
            for (; a + LANES <= count; a += LANES) {
                Vector sum = load_float(to + a);
                if (streams > 1)
                    for (int i = 0; i < ROWS; i++) {
                        const NUMBER *row = from + i * span * m + a;
                        sum += factor[i] * NAME(load)(row);
                        if (j == 0) __builtin_prefetch((const char *)row + AHEAD, 0, 2);
                    }
                else sum += factor[0] * NAME(load)(from + a);
                store_float(to + a, sum);
            }
            for (; a < count; a++)
                for (int i = 0; i < streams; i++)
                    to[a] = fused(factor[i], NAME(read)(from + i * span * m + a), to[a]);
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
                    sum = fused(b[r * entries + i * n2 + d], p[r * apart + d * step + a], sum);
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

/* The small factors of a group in full as floats, (terms, m2, n2); of low rank only their scalars. */
static void NAME(factors)(const Group *g, float *out) {
    long entries = g->m2 * g->n2, kept = g->order ? g->terms : 0, given = entries - kept;
    const NUMBER *small = g->small, *scalars = g->scalars;
    for (long r = 0; r < g->terms; r++) {
        float scale = scalars ? NAME(read)(scalars + r) : 1;
        if (low_rank(g)) out[r] = scale;
        else
            for (long e = 0; e < entries; e++) {
                long column = g->order ? g->order[e] : e;
                out[r * entries + e] = !small ? 1 : column < kept
                    ? column == r : scale * NAME(read)(small + r * given + column - kept);
            }
    }
}

/* y (tokens, m) += the product of x (tokens, n) with one group. */
static void NAME(add)(const Group *g, const float *x, float *y, long tokens, int threads, float *memory) {
    long terms = g->terms, m1 = g->m1, n1 = g->n1, m2 = g->m2, n2 = g->n2, n = n1 * n2;
    long rows = tokens * slices(g), wide = width(g), entries = m2 * n2;
    long kept = g->order ? terms : 0, given = entries - kept, mine_only = scratch(g, tokens, threads);
    int narrow = low_rank(g);
    float *inputs = memory, *factors = inputs + tokens * n;
    float *mixed = factors + (narrow ? terms : terms * entries), *products = mixed + rows * wide;
    if (g->small_outer && !(narrow && g->order)) inputs = (float *)x;
    else
        for (long t = 0; t < tokens; t++) /* slices one after the other, (tokens, n2, n1) */
            for (long d = 0; d < n2; d++)
                for (long b = 0; b < n1; b++) {
                    long to = narrow && g->order ? g->order[d] : d;
                    inputs[t * n + to * n1 + b] = x[t * n + (g->small_outer ? d * n1 + b : b * n2 + d)];
                }
    NAME(factors)(g, factors);
    const float *z = g->mix_first && g->small ? mixed : inputs;
    const NUMBER *small = g->small, *weight = g->weight;
    long chunk = chunk_of(g, threads), several = piece(terms, threads, CHUNK);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *mine = products;
#ifdef _OPENMP
        extern int omp_get_thread_num(void);
        mine += omp_get_thread_num() * mine_only;
#endif
        if (narrow) {
#pragma omp for schedule(static)
            for (long start = 0; start < terms; start += several) {
                long count = start + several <= terms ? several : terms - start;
                NAME(products)(small + start * given, count, given, inputs + kept, n, tokens, mine, several);
                for (long t = 0; t < tokens; t++)
                    for (long i = start; i < start + count; i++)
                        mixed[t * terms + i] = factors[i] *
                            (mine[t * several + i - start] + (kept ? inputs[t * n + i] : 0));
            }
        } else if (z == mixed) {
#pragma omp for schedule(static)
            for (long line = 0; line < tokens * terms; line++) {
                long t = line / terms, r = line % terms;
                NAME(mixes)(factors + r * entries, 0, n2, 1, inputs + t * n, 0, n1, n1, m2,
                            mixed + (t * m2 * terms + r) * n1, wide);
            }
        }
#pragma omp for schedule(static)
        for (long start = 0; start < m1; start += chunk) {
            long count = start + chunk <= m1 ? chunk : m1 - start;
            if (g->by_columns) NAME(sums)(weight + start, m1, count, n1, z, n1, rows, mine, chunk);
            for (long r = 0; !g->by_columns && r < made(g); r++)
                NAME(products)(weight + (r * m1 + start) * wide, count, wide, z, wide, rows,
                               mine + r * rows * chunk, chunk);
            for (long t = 0; t < tokens; t++) {
                float *slice = mine + t * slices(g) * chunk; /* m2 of them, `chunk` apart */
                if (!g->mix_first) {
                    NAME(mixes)(factors, entries, n2, terms, slice, rows * chunk, chunk, count, m2,
                                mine + made(g) * rows * chunk, chunk);
                    slice = mine + made(g) * rows * chunk;
                }
                float *to = y + t * m1 * m2;
                for (long c = 0; c < m2; c++)
                    if (g->small_outer)
                        for (long a = 0; a < count; a++) to[c * m1 + start + a] += slice[c * chunk + a];
                    else
                        for (long a = 0; a < count; a++) to[(start + a) * m2 + c] += slice[c * chunk + a];
            }
        }
    }
}

/* y (tokens, m) = the product of x (tokens, n) with a matrix, and its bias. */
static void NAME(multiply)(
    const Matrix *matrix, const float *x, float *y, long tokens, int threads, float *memory) {
    for (long t = 0; t < tokens; t++)
        for (long i = 0; i < matrix->m; i++)
            y[t * matrix->m + i] = matrix->bias ? NAME(read)((const NUMBER *)matrix->bias + i) : 0;
    for (long i = 0; i < matrix->count; i++)
        NAME(add)(matrix->groups + i, x, y, tokens, threads, memory);
}

/* An MLP: `down` of the activation of what the first of `ups` gives, times what the second gives where
 * there is one; a first one of twice the hidden axis gives both, one after the other. Without `down`,
 * the first matrix alone. Returns 0, or 1 where there is no memory for the intermediate results. */
int NAME(decode)(const Matrix *ups, long count, int activation, const Matrix *down, const NUMBER *x,
                 NUMBER *y, long tokens, int threads) {
    long n = ups->n, m = down ? down->m : ups->m, room = needed(ups, tokens, threads);
    if (count > 1) room = longest(room, needed(ups + 1, tokens, threads));
    if (down) room = longest(room, needed(down, tokens, threads));
    long written = down ? ups->m + (count > 1 ? ups[1].m : 0) : 0;
    float *memory = malloc(sizeof(float) * (tokens * (n + m + written) + room));
    if (!memory) return 1;
    float *inputs = memory, *results = inputs + tokens * n, *hidden = results + tokens * m;
    float *beside = hidden + tokens * ups->m, *rest = hidden + tokens * written;
    for (long i = 0; i < tokens * n; i++) inputs[i] = NAME(read)(x + i);
    NAME(multiply)(ups, inputs, down ? hidden : results, tokens, threads, rest);
    if (down) {
        long wide = down->n, pitch = count > 1 ? wide : ups->m;
        if (count > 1) NAME(multiply)(ups + 1, inputs, beside, tokens, threads, rest);
        else if (ups->m > wide) beside = hidden + wide;
        else beside = NULL;
        for (long t = 0; t < tokens; t++) /* `hidden` moves together, to rows of `wide` */
            for (long a = 0; a < wide; a += LANES) {
                float v[2][LANES] = {{0}};
                long here = wide - a < LANES ? wide - a : LANES;
                memcpy(v[0], hidden + t * ups->m + a, here * sizeof(float));
                Vector of = activated(load_float(v[0]), activation, PRECISE);
                if (beside) {
                    memcpy(v[1], beside + t * pitch + a, here * sizeof(float));
                    of *= load_float(v[1]);
                }
                store_float(v[0], of);
                memcpy(hidden + t * wide + a, v[0], here * sizeof(float));
            }
        NAME(multiply)(down, hidden, results, tokens, threads, rest);
    }
    for (long i = 0; i < tokens * m; i++) NAME(write)(y + i, results[i]);
    free(memory);
    return 0;
}

#endif
