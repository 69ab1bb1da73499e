/* A factored MLP for many tokens in bfloat16, on a CPU with a tile unit (AMX).
 *
 * The weight is the left operand of every product, read as it lies, so that a sum of 32 x 32 numbers
 * holds outputs by tokens. What the second product reads, pairs of features for 32 tokens side by side,
 * is then what the first one and the activation leave, without a transposition. A block of tokens stays
 * in the second cache from end to end. The unit works beside the vectors: what is element by element of
 * one sum is spread over the steps of the next one, and takes next to no time of its own.
 */
#include "vectors.h"

enum { SIDE = 32, SUM = SIDE * SIDE, MOST_SLICES = 64 };

/* Slices of k features through weights (weights, m, k), which lie `weight` and their rows `row` numbers
 * apart: slice s is slice s / weights of the inputs through weight s % weights. */
typedef struct {
    const uint16_t *w;
    long weights, m, k, weight, row, slices;
} Product;

/* A product, and what becomes of its slices: `outs` of them. */
typedef struct {
    Product product;
    const float *mixing; /* (outs, slices), or NULL: they stay */
    const float *bias;   /* (outs, m), or NULL */
    long outs;
} Matrix;

/* What a matrix reads. */
typedef struct {
    const uint16_t *x;   /* (tokens, given, side) */
    const float *mixing; /* (taken, given), or NULL: the slices stay */
    long given, taken, side;
} Input;

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <sys/syscall.h>
#include <unistd.h>

enum { FEW = 3 }; /* panels of a thread, below which threads share outputs */
int omp_get_thread_num(void);
int omp_get_num_threads(void);

#define INLINE static inline __attribute__((always_inline))
#define FENCE __asm__ volatile("" ::: "memory") /* tiles are read past the compiler's knowledge */

/* A block of tokens on its way. */
typedef struct {
    const Matrix *gate, *other, *down; /* `other` NULL: there is no gate */
    const float *mixing;               /* (p, slices of the hidden axis), or NULL */
    uint16_t *y;                       /* (tokens, outs of `down`, m) */
    uint32_t *x[2], *hidden;           /* panels: (pairs of features, SIDE) */
    uint16_t *rows;                    /* room for SIDE rows of every weight */
    float *sums[2];                    /* room for those of all slices, which take turns */
    long features[2], p, tokens;
    long mine, share; /* this thread's part, of the `share` that outputs are divided among */
} Block;

/* Sums to which nothing has been done yet, of outputs from `first` and the tokens of one panel. */
typedef struct {
    const float *sums; /* (slices, SIDE, SIDE), or NULL */
    long first, panel, items, done;
} Waiting;

static const uint16_t PAIRS[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

static long padded(long features) { return (features + SIDE - 1) / SIDE * SIDE; }

/* Two features of 16 tokens as 16 pairs. */
INLINE __m512i paired(Vector even, Vector odd) {
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(PAIRS), both);
}

INLINE void transposed(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* 32 features of a token, from a slice on; `left` of them where those are fewer. */
INLINE __m512i taken(const Input *in, long slice, const uint16_t *x, long left) {
    if (!in->mixing) return _mm512_maskz_loadu_epi16(left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1, x);
    Vector low = {0}, high = {0};
    for (long g = 0; g < in->given; g++, x += in->side) {
        Vector factor = constant(in->mixing[slice * in->given + g]);
        low += factor * load_bfloat16(x);
        high += factor * load_bfloat16(x + 16);
    }
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

/* Inputs as panels of SIDE tokens: (pairs of features, SIDE); zeros where there is none. */
static void pack(const Input *in, long tokens, uint32_t *panels) {
    long pairs = padded(in->taken * in->side) / 2, given = in->given * in->side;
    for (long t = 0; t < tokens; t += 16) {
        uint32_t *to = panels + t / SIDE * SIDE * pairs + t % SIDE;
        for (long slice = 0; slice < in->taken; slice++)
            for (long a = 0; a < in->side; a += 32) {
                __m512i r[16];
                for (long i = 0; i < 16; i++) {
                    const uint16_t *x = in->x + (t + i) * given + a;
                    r[i] = t + i < tokens ? taken(in, slice, x, in->side - a) : _mm512_setzero_si512();
                }
                transposed(r);
                for (long i = 0; i < 16; i++, to += SIDE) _mm512_storeu_si512(to, r[i]);
            }
    }
    if ((tokens + 15) / 16 % 2) /* the panel's other half */
        for (long a = 0; a < pairs; a++)
            _mm512_storeu_si512(panels + tokens / SIDE * SIDE * pairs + 16 + a * SIDE, _mm512_setzero_si512());
}

/* SIDE rows of every weight, as they lie in the weights or copied, with zeros beyond an edge. */
typedef struct {
    const uint16_t *at;
    long weight, row; /* how far apart weights and rows lie */
} Rows;

static Rows rows_from(const Product *of, long first, uint16_t *room) {
    long k = of->k, wide = padded(k);
    const uint16_t *from = of->w + first * of->row;
    if (k == wide && first + SIDE <= of->m) return (Rows){from, of->weight, of->row};
    for (long w = 0; w < of->weights; w++)
        for (long i = 0; i < SIDE; i++) {
            uint16_t *to = room + (w * SIDE + i) * wide;
            long given = first + i < of->m ? k : 0;
            memcpy(to, from + w * of->weight + i * of->row, given * sizeof(*to));
            memset(to + given, 0, (wide - given) * sizeof(*to));
        }
    return (Rows){room, SIDE * wide, wide};
}

INLINE void configured(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.rows[i] = 16;
    _tile_loadconfig(&tiles);
}

/* What a matrix makes of its sums: one feature of 16 tokens. */
INLINE Vector made(const float *z, const float *mixing, long slices, float bias) {
    Vector h = constant(bias);
    if (!mixing) return h + load_float(z);
    for (long s = 0; s < slices; s++) h += mixing[s] * load_float(z + s * SUM);
    return h;
}

/* Two features of 16 tokens of the hidden axis. `mixed`, a constant: to so many slices, none (0) or any
 * number (MOST_SLICES). */
INLINE void hide(const Block *of, const Waiting *sums, int activation, int gated, int mixed) {
    Matrix gate = *of->gate, other = gated ? *of->other : gate;
    long row = sums->done / 2 * 2, half = sums->done % 2 * 16, m = gate.product.m, feature = sums->first + row;
    if (feature >= m) return;
    long p = mixed && mixed < MOST_SLICES ? mixed : of->p, pairs = m / 2 * SIDE;
    uint32_t *to = of->hidden + sums->panel * padded(p * m) / 2 * SIDE + feature / 2 * SIDE + half;
    const float *z = sums->sums + row * SIDE + half, *beside = z + gate.product.slices * SUM;
    const float *mixing = of->mixing, none[2] = {0};
    Vector even[mixed + 1], odd[mixed + 1];
    for (long i = 0; mixed && i < p; i++) even[i] = odd[i] = (Vector){0};
    for (long j = 0; j < gate.outs; j++) {
        const float *bias = gate.bias ? gate.bias + j * m + feature : none;
        Vector left = activated(made(z, gate.mixing, gate.product.slices, bias[0]), activation, 0);
        Vector right = activated(made(z + SIDE, gate.mixing, gate.product.slices, bias[1]), activation, 0);
        if (gated) {
            bias = other.bias ? other.bias + j * m + feature : none;
            left *= made(beside, other.mixing, other.product.slices, bias[0]);
            right *= made(beside + SIDE, other.mixing, other.product.slices, bias[1]);
        }
        if (gate.mixing) gate.mixing += gate.product.slices;
        else z += SUM;
        if (gated && other.mixing) other.mixing += other.product.slices;
        else beside += SUM;
        if (!mixed) _mm512_storeu_si512(to + j * pairs, paired(left, right));
        for (long i = 0; mixed && i < p; i++) {
            even[i] += mixing[i * gate.outs + j] * left;
            odd[i] += mixing[i * gate.outs + j] * right;
        }
    }
    for (long i = 0; mixed && i < p; i++) _mm512_storeu_si512(to + i * pairs, paired(even[i], odd[i]));
}

/* SIDE results of one slice, for 16 tokens. */
INLINE void give(const Block *of, const Waiting *sums) {
    const Matrix *down = of->down;
    long slice = sums->done / 2, half = sums->done % 2 * 16, m = down->product.m, left = m - sums->first;
    const float *mixing = down->mixing ? down->mixing + slice * down->product.slices : NULL;
    const float *z = sums->sums + (mixing ? 0 : slice * SUM) + half;
    const float *bias = down->bias ? down->bias + slice * m + sums->first : NULL;
    __m512i r[16];
    for (long i = 0; i < 16; i++, z += 2 * SIDE) {
        int here = bias && 2 * i < left; /* features are in pairs */
        Vector even = made(z, mixing, down->product.slices, here ? bias[2 * i] : 0);
        r[i] = paired(even, made(z + SIDE, mixing, down->product.slices, here ? bias[2 * i + 1] : 0));
    }
    transposed(r);
    __mmask32 here = left >= SIDE ? ~0u : (1u << left) - 1;
    long token = sums->panel * SIDE + half, features = down->outs * m;
    for (long i = 0; i < 16 && token + i < of->tokens; i++)
        _mm512_mask_storeu_epi16(of->y + (token + i) * features + slice * m + sums->first, here, r[i]);
}

/* The sums of all slices for SIDE outputs and the tokens of one panel; and, step by step of the tile
 * unit, what is to be done to those that wait. */
INLINE void sum_up(const Block *of, const Product *product, Rows rows, const uint32_t *x, float *to,
                   Waiting *waiting, long *step, long steps, int activation, int gated, int mixed, int last) {
    long k = product->k;
    for (long s = 0; s < product->slices; s++, to += SUM) {
        const uint16_t *w = rows.at + s % product->weights * rows.weight;
        const uint32_t *from = x + s / product->weights * k / 2 * SIDE;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (long a = 0; a < k; a += 32, w += 32, from += 16 * SIDE) {
            _tile_loadd(4, w, 2 * rows.row);
            _tile_loadd(6, from, 4 * SIDE);
            _tile_loadd(7, from + 16, 4 * SIDE);
            _tile_loadd(5, w + 16 * rows.row, 2 * rows.row);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            for (++*step; waiting->done * steps < waiting->items * *step; waiting->done++)
                last ? give(of, waiting) : hide(of, waiting, activation, gated, mixed);
        }
        _tile_stored(0, to, 4 * SIDE);
        _tile_stored(1, to + 16, 4 * SIDE);
        _tile_stored(2, to + 16 * SIDE, 4 * SIDE);
        _tile_stored(3, to + 16 * SIDE + 16, 4 * SIDE);
    }
}

/* One side of the hidden axis: what writes it, or what reads it. */
INLINE void side(const Block *of, int activation, int gated, int mixed, int last) {
    const Product *first = last ? &of->down->product : &of->gate->product;
    const Product *second = gated && !last ? &of->other->product : NULL;
    long features = last ? of->p * of->gate->product.m : of->features[0], turn = 0;
    long steps = first->slices * padded(first->k) / 32 + (second ? second->slices * padded(second->k) / 32 : 0);
    uint16_t *beyond = of->rows + first->weights * SIDE * padded(first->k);
    Waiting waiting = {0};
    long groups = (first->m + SIDE - 1) / SIDE, end = groups * (of->mine + 1) / of->share * SIDE;
    for (long row = groups * of->mine / of->share * SIDE; row < end; row += SIDE) {
        Rows rows = rows_from(first, row, of->rows), others = second ? rows_from(second, row, beyond) : rows;
        FENCE;
        for (long panel = 0; panel * SIDE < of->tokens; panel++, turn = !turn) {
            const uint32_t *x = last ? of->hidden : of->x[0];
            float *to = of->sums[turn];
            long step = 0;
            x += panel * padded(features) / 2 * SIDE;
            sum_up(of, first, rows, x, to, &waiting, &step, steps, activation, gated, mixed, last);
            if (second) {
                x = of->x[1] + panel * padded(of->features[1]) / 2 * SIDE;
                float *beside = to + first->slices * SUM;
                sum_up(of, second, others, x, beside, &waiting, &step, steps, activation, gated, mixed, last);
            }
            /* Halves of slices, or pairs of rows by halves. */
            waiting = (Waiting){to, row, panel, last ? 2 * of->down->outs : SIDE, 0};
        }
    }
    for (; waiting.done < waiting.items; waiting.done++)
        last ? give(of, &waiting) : hide(of, &waiting, activation, gated, mixed);
    FENCE;
}

/* Zeros in what pads the features of panels. */
static void pad(uint32_t *panels, long features, long tokens) {
    long none = (padded(features) - features) / 2 * SIDE;
    for (long t = 0; none && t < tokens; t += SIDE) {
        panels += padded(features) / 2 * SIDE;
        memset(panels - none, 0, none * sizeof(*panels));
    }
}

static void write_side(const Block *of, int activation) {
    int mixed = !of->mixing ? 0 : of->p <= 2 ? of->p : MOST_SLICES;
    /* The constants let the compiler leave out what is not asked for. */
#define WRITE(ACTIVATION, GATED)                              \
    if (mixed == 0) side(of, ACTIVATION, GATED, 0, 0);        \
    else if (mixed == 1) side(of, ACTIVATION, GATED, 1, 0);   \
    else if (mixed == 2) side(of, ACTIVATION, GATED, 2, 0);   \
    else side(of, ACTIVATION, GATED, MOST_SLICES, 0);
    if (activation == TANH_GELU && !of->other) {
        WRITE(TANH_GELU, 0)
    } else if (activation == SILU && of->other) {
        WRITE(SILU, 1)
    } else {
        side(of, activation, of->other != NULL, mixed, 0);
    }
#undef WRITE
}

static void read_side(const Block *of) { side(of, NONE, 0, 0, 1); }

/* A matrix alone, from panels to panels. */
static void pass(Block of, const Matrix *by, uint32_t *from, long features, uint32_t *to) {
    of.gate = by, of.other = NULL, of.mixing = NULL, of.p = by->outs;
    of.x[0] = from, of.features[0] = features, of.hidden = to;
    write_side(&of, NONE);
}

static long larger(long a, long b) { return a > b ? a : b; }

/* Kept from call to call: fresh pages would take a tenth of the time. */
static char *room_of(size_t bytes) {
    static __thread char *room;
    static __thread size_t size;
    if (size < bytes) {
        free(room);
        room = aligned_alloc(64, bytes);
        size = room ? bytes : 0;
    }
    return room;
}

/* Whether this process may use the tile unit. */
int tiles_allowed(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; } /* ARCH_REQ_XCOMP_PERM, XTILEDATA */

/* y (tokens, outs of `down`, m): `count` inputs, through the `enters` of what writes the hidden axis where
 * there are some; through that, one matrix or two; activation and `mixing` (p, outs); through `between`
 * where there is one, and `down`. By blocks of up to `most` panels. Not 0: no memory. */
int tiles(const Input *inputs, int count, const Matrix *enters, const Matrix *ups, int matrices, int activation,
          const float *mixing, long p, const Matrix *between, const Matrix *down, uint16_t *y, long tokens, long most,
          int threads) {
    enum { RAW, X = 2, HIDDEN = 4, MIDDLE, SUMS, TURN, ROWS, PARTS };
    long panels = (tokens + SIDE - 1) / SIDE, width = (panels < most ? panels : most) * SIDE * 2;
    /* Numbers of a token, then bytes in the rooms of a thread. */
    long numbers[MIDDLE + 1] = {0}, parts[PARTS], sums = 0, rows = 0, bytes = 0;
    const Matrix *all_of[] = {enters, enters ? enters + matrices - 1 : NULL, ups, ups + matrices - 1, between, down};
    for (int i = 0; i < 6; i++) {
        if (!all_of[i]) continue;
        const Product *of = &all_of[i]->product;
        int pair = matrices > 1 && (i == 2 || i == 3); /* at the same time */
        sums = larger(sums, of->slices * (1 + pair)), rows = larger(rows, of->weights * padded(of->k) * (1 + pair));
    }
    for (int i = 0; i < count; i++) numbers[(enters ? RAW : X) + i] = inputs[i].taken * inputs[i].side;
    for (int i = 0; enters && i < matrices; i++) numbers[X + i] = enters[i].outs * enters[i].product.m;
    numbers[HIDDEN] = p * ups->product.m;
    if (between) numbers[MIDDLE] = between->outs * between->product.m;
    for (int i = 0; i <= MIDDLE; i++) parts[i] = width * padded(numbers[i]);
    parts[SUMS] = parts[TURN] = sums * SUM * 4, parts[ROWS] = rows * SIDE * 2;
    for (int i = 0; i < PARTS; i++) bytes += parts[i];
    char *rooms = room_of(bytes * threads);
    if (!rooms) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        /* Of a few tokens, threads share the outputs: each reads its part of the weights. */
        long me = omp_get_thread_num(), all = omp_get_num_threads();
        long share = panels < FEW * all ? (FEW * all + panels - 1) / panels : 1;
        if (share > all) share = all;
        long teams = all / share, blocks = (panels + most - 1) / most;
        blocks = (blocks + teams - 1) / teams * teams;
        if (blocks > panels) blocks = panels;
        configured();
        for (long round = 0; round * teams < blocks; round++) {
            long b = round * teams + me / share;
            long from = panels * b / blocks * SIDE, to = panels * (b + 1) / blocks * SIDE;
            int takes_part = me < teams * share && b < blocks;
            void *at[PARTS];
            char *shared = rooms + me / share * share * bytes, *own = rooms + me * bytes;
            for (int i = 0; i < PARTS; shared += parts[i], own += parts[i], i++) at[i] = i < SUMS ? shared : own;
            Block of = {ups, matrices > 1 ? ups + 1 : NULL, down, mixing, y + from * down->outs * down->product.m};
            of.x[0] = at[X], of.x[1] = numbers[X + 1] ? at[X + 1] : at[X], of.hidden = at[HIDDEN];
            of.features[0] = numbers[X], of.features[1] = numbers[X + 1] ? numbers[X + 1] : numbers[X];
            of.sums[0] = at[SUMS], of.sums[1] = at[TURN], of.rows = at[ROWS];
            of.p = p, of.tokens = (to < tokens ? to : tokens) - from;
            of.mine = me % share, of.share = share;
            if (takes_part && of.mine == 0) {
                for (int i = 0; i < count; i++) {
                    Input here = inputs[i];
                    here.x += from * here.given * here.side;
                    pack(&here, of.tokens, at[(enters ? RAW : X) + i]);
                }
                for (int i = X; i <= MIDDLE; i++)
                    if (enters || i >= HIDDEN) pad(at[i], numbers[i], of.tokens);
                FENCE;
            }
#define TOGETHER                       \
    if (share > 1) {                   \
        _Pragma("omp barrier")         \
    }
            TOGETHER
            for (int i = 0; enters && takes_part && i < matrices; i++) {
                int raw = i < count ? i : 0;
                pass(of, enters + i, at[RAW + raw], numbers[RAW + raw], at[X + i]);
            }
            if (enters) TOGETHER
            if (takes_part) write_side(&of, activation);
            TOGETHER
            if (between && takes_part) pass(of, between, at[HIDDEN], numbers[HIDDEN], at[MIDDLE]);
            if (between) {
                of.gate = between, of.p = between->outs, of.hidden = at[MIDDLE];
                TOGETHER
            }
            if (takes_part) read_side(&of);
            TOGETHER /* before the room is used again */
#undef TOGETHER
        }
        _tile_release();
    }
    return 0;
}
#else
int tiles_allowed(void) { return 0; }
int tiles(void) { return 1; }
#endif
