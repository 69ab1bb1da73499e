/* Vectors of floats in registers, numbers of both dtypes read into them, and activations.
 *
 * Plain C without headers of torch: cpu_kernels.py compiles decode.c and hidden.c with the system's
 * compiler in about a second, once, for this very processor, and calls them through ctypes. Each of
 * the two includes itself twice: NUMBER is the type that tensors are stored in, NAME(f) the name of a
 * function for it, and PRECISE whether an activation inside of an MLP needs the last digits of float32.
 * Everything is summed in float32.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 8 }; /* numbers in a register, and rows of w in one kernel call */
#elif defined(__AVX__)
enum { LANES = 8, ROWS = 4 };
#else
enum { LANES = 4, ROWS = 8 };
#endif
enum { SLICES = 4 };           /* mixed together */
enum { SHARED = 1 << 15 };     /* numbers from which an element-wise loop is shared among threads */
enum { NONE, TANH_GELU, SILU }; /* activations, as in cpu_kernels.py */

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

/* a b + c, rounded once where the processor can. For what a loop over whole vectors leaves: compilers
 * contract that as they please, and where it begins depends on the number of threads. */
static inline float fused(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#endif
    return a * b + c;
}

/* Where the mask is set (all bits of a lane) `yes`, elsewhere `no`. */
static inline Words chosen(Mask where, Words yes, Words no) {
    return ((Words)where & yes) | (~(Words)where & no);
}
static inline Vector constant(float v) {
#ifdef __AVX512F__ /* a load fills all lanes; a sum takes an addition and a shuffle */
    return (Vector)_mm512_set1_ps(v);
#endif
    return (Vector){0} + v;
}

static inline Vector within(Vector v, float most) {
#ifdef __AVX512F__ /* NaN stays NaN: of two numbers that can't be compared, the second */
    v = (Vector)_mm512_max_ps((__m512)constant(-most), (__m512)v);
    return (Vector)_mm512_min_ps((__m512)constant(most), (__m512)v);
#else
    v = (Vector)chosen(v < -most, (Words)constant(-most), (Words)v);
    return (Vector)chosen(v > most, (Words)constant(most), (Words)v);
#endif
}

/* 2 to the power of v, and where `precise`, a constant where this is called, of no more than 126: right to
 * the last digits, else to 13 of them; bfloat16 keeps 8. Polynomials of v - floor(v) with the least relative
 * error, 2e-9 and 7e-5. */
static inline __attribute__((always_inline)) Vector power_of_two(Vector v, int precise) {
#ifdef __AVX512DQ__ /* NaN stays NaN: of two numbers that can't be compared, the second */
    if (precise) v = (Vector)_mm512_min_ps((__m512)constant(126.0f), (__m512)v);
    Vector r = (Vector)_mm512_reduce_ps((__m512)v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    v = within(v, 126.0f);
    /* Adding 1.5 * 2^23 rounds, and leaves the whole number in the low bits. */
    Vector shifted = v - 0.5f + 12582912.0f, r = v - (shifted - 12582912.0f);
#endif
    Vector sum = (r * 0.0780245215f + 0.226067156f) * r + 0.695833564f;
    if (precise) {
        sum = r * 0.000217022549f + 0.00124396873f;
        sum = sum * r + 0.00967884064f;
        sum = sum * r + 0.0554833412f;
        sum = sum * r + 0.24022983f;
        sum = sum * r + 0.693147004f;
    }
    sum = sum * r + (precise ? 1.0f : 0.999925196f);
#ifdef __AVX512DQ__
    return (Vector)_mm512_scalef_ps((__m512)sum, (__m512)v); /* sum 2^floor(v) */
#else
    return sum * (Vector)(((Words)shifted << 23) + 0x3f800000u);
#endif
}

/* 1 / v for v from 1 to 1e38. A division occupies its unit for 16 cycles; a step of Newton's makes 27
 * digits of an estimate of 14. */
static inline __attribute__((always_inline)) Vector inverse(Vector v, int precise) {
#ifdef __AVX512F__
    Vector guess = (Vector)_mm512_rcp14_ps((__m512)v);
    return precise ? guess + guess * (1.0f - v * guess) : guess;
#else
    return 1.0f / v;
#endif
}

/* x / 2 (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), and x / (1 + exp(-x)): x s with the
 * logistic function s of 2 u, or of x. This is 1 / s, and the numbers are divided by log 2. */
static inline __attribute__((always_inline)) Vector divisor(Vector v, int activation, int precise) {
    Vector power = activation == SILU ? v * -1.44269504f : v * (-2.30220819f - 0.102943240f * v * v);
    return 1.0f + power_of_two(power, precise);
}

static inline __attribute__((always_inline)) Vector activated(Vector v, int activation, int precise) {
    return activation == NONE ? v : v * inverse(divisor(v, activation, precise), precise);
}

/* The derivative for TANH_GELU: s + v s (1 - s) 2 u' */
static inline Vector gelu_slope(Vector v) {
    v = within(v, 32.0f); /* 0 or 1 beyond, and squares of v may be infinite */
    Vector s = inverse(divisor(v, TANH_GELU, 1), 1);
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
#ifdef __AVX512F__ /* one instruction, where compilers take four for what is below */
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return (Vector)_mm512_slli_epi32(wide, 16);
#endif
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
