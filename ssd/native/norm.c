/* Batch normalisation with what follows it, on maps whose channels lie next to each other: rows of `channels` values,
 * float32 or bfloat16. One pass over memory less for each operation that would otherwise stand apart. Each part works on
 * rows of its own, so that several threads can share a map.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define LANES 16
#define TILE 64    /* channels that are kept in registers */
#define STRETCH 64 /* rows that are summed in float32 before they go to float64 */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef floats floats_at __attribute__((aligned(4), may_alias));
typedef halves halves_at __attribute__((aligned(2), may_alias));

#if defined(__AVX512F__)
static inline floats load(const void *at, int64_t place, int half) {
    if (!half) return *(const floats_at *)((const float *)at + place);
    __m256i bits = _mm256_loadu_si256((const void *)((const uint16_t *)at + place));
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

/* To bfloat16 the nearest, halves to even. */
static inline void store(void *at, int64_t place, int half, floats x) {
    if (!half) {
        *(floats_at *)((float *)at + place) = x;
        return;
    }
    __m512i bits = (__m512i)x, one = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), one);
    __mmask16 nan = _mm512_cmpgt_epi32_mask(_mm512_and_epi32(bits, _mm512_set1_epi32(0x7fffffff)),
                                            _mm512_set1_epi32(0x7f800000));
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256((void *)((uint16_t *)at + place), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

/* Negative numbers become 0 and what is no number stays: asked of the bits, which no compiler's arithmetic changes. */
static inline floats positive(floats x) {
    __mmask16 negative = _mm512_cmple_epu32_mask(_mm512_sub_epi32((__m512i)x, _mm512_set1_epi32((int)0x80000000)),
                                                 _mm512_set1_epi32(0x7f800000));
    return (floats)_mm512_mask_mov_epi32((__m512i)x, negative, _mm512_setzero_si512());
}

static inline floats where_not_zero(floats of, floats x) {
    return (floats)_mm512_maskz_mov_epi32(_mm512_test_epi32_mask((__m512i)of, (__m512i)of), (__m512i)x);
}
#else
static inline floats load(const void *at, int64_t place, int half) {
    if (!half) return *(const floats_at *)((const float *)at + place);
    return (floats)(__builtin_convertvector(*(const halves_at *)((const uint16_t *)at + place), words) << 16);
}

/* To bfloat16 the nearest, halves to even. */
static inline void store(void *at, int64_t place, int half, floats x) {
    if (!half) {
        *(floats_at *)((float *)at + place) = x;
        return;
    }
    words bits = (words)x;
    words nan = (words)((bits & 0x7fffffffu) > 0x7f800000u);
    bits = bits + 0x7fffu + (bits >> 16 & 1u);
    bits = (bits & ~nan) | (nan & 0x7fc00000u);
    *(halves_at *)((uint16_t *)at + place) = __builtin_convertvector(bits >> 16, halves);
}

/* Negative numbers become 0 and what is no number stays: asked of the bits, which no compiler's arithmetic changes. */
static inline floats positive(floats x) {
    words bits = (words)x, negative = (words)((bits >= 0x80000000u) & (bits <= 0xff800000u));
    return (floats)(bits & ~negative);
}

static inline floats where_not_zero(floats of, floats x) {
    return (floats)((words)x & (words)((words)of != 0u));
}
#endif

/* A map of few channels is one of TILE channels and fewer rows, several pixels a row. */
static int64_t widened(int64_t *rows, int64_t channels) {
    if (channels >= TILE || TILE % channels || (*rows * channels) % TILE) return channels;
    *rows = *rows * channels / TILE;
    return TILE;
}

EXPORT int64_t ssd_norm_fits(int64_t rows, int64_t channels) { return widened(&rows, channels) % TILE == 0; }

/* Sums over rows of x and of x squared, added to `sums` (2, channels); with `gradient`, of g and of g x, where g is the
 * gradient where `output` is not zero (NULL: everywhere). */
static void sums_of(const void *x, const void *gradient, const void *output, int64_t first, int64_t last,
                    int64_t channels, int64_t half, double *sums) {
    int64_t rows = last - first, width = widened(&rows, channels), start = first * channels;
    for (int64_t row = 0; row < rows; row += STRETCH) {
        int64_t until = row + STRETCH < rows ? row + STRETCH : rows;
        for (int64_t tile = 0; tile < width; tile += TILE) {
            floats a[4] = {{0}}, b[4] = {{0}};
            for (int64_t r = row; r < until; r++)
                for (int k = 0; k < 4; k++) {
                    int64_t at = start + r * width + tile + k * LANES;
                    floats value = load(x, at, half), g = value;
                    if (gradient) {
                        g = load(gradient, at, half);
                        if (output) g = where_not_zero(load(output, at, half), g);
                    }
                    a[k] += g;
                    b[k] += g * value;
                }
            float of_a[TILE], of_b[TILE];
            memcpy(of_a, a, sizeof of_a), memcpy(of_b, b, sizeof of_b);
            if (width == channels)
                for (int i = 0; i < TILE; i++)
                    sums[tile + i] += of_a[i], sums[channels + tile + i] += of_b[i];
            else
                for (int i = 0; i < TILE; i++)
                    sums[i % channels] += of_a[i], sums[channels + i % channels] += of_b[i];
        }
    }
}

static void spread_over(const float *from, int64_t channels, int64_t width, float *to) {
    for (int64_t i = 0; i < width; i += channels) memcpy(to + i, from, channels * sizeof(float));
}

/* x * scale + shift, plus `residual` where there is one, without what is negative where `relu`. */
static void apply(const void *x, const void *residual, int64_t first, int64_t last, int64_t channels, int64_t half,
                  const float *scale, const float *shift, int64_t relu, void *out) {
    int64_t rows = last - first, width = widened(&rows, channels), start = first * channels;
    float a[width], b[width];
    spread_over(scale, channels, width, a);
    spread_over(shift, channels, width, b);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i += LANES) {
            int64_t at = start + row * width + i;
            floats y = load(x, at, half) * *(floats_at *)(a + i) + *(floats_at *)(b + i);
            if (residual) y += load(residual, at, half);
            store(out, at, half, relu ? positive(y) : y);
        }
}

/* The gradient of x, g * a + x * b + c with g as in the sums; where `masked` is asked for, g itself goes there. */
static void gradient_of(const void *x, const void *gradient, const void *output, int64_t first, int64_t last,
                        int64_t channels, int64_t half, const float *a, const float *b, const float *c, void *out,
                        void *masked) {
    int64_t rows = last - first, width = widened(&rows, channels), start = first * channels;
    float of_g[width], of_x[width], rest[width];
    spread_over(a, channels, width, of_g);
    spread_over(b, channels, width, of_x);
    spread_over(c, channels, width, rest);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i += LANES) {
            int64_t at = start + row * width + i;
            floats g = load(gradient, at, half);
            if (output) g = where_not_zero(load(output, at, half), g);
            if (masked) store(masked, at, half, g);
            store(out, at, half,
                  g * *(floats_at *)(of_g + i) + load(x, at, half) * *(floats_at *)(of_x + i) + *(floats_at *)(rest + i));
        }
}

/* ------------------------------------------------------------------ parts, by torch's own threads */

enum { SUMS, APPLY, GRADIENT };

/* One part of the rows. Which of the pointers count, and what for, is the kind's: see `run`. */
struct part {
    int64_t kind, first, last, channels, half, relu;
    const void *x, *other, *output;
    const float *a, *b, *c;
    void *out, *masked;
    double *sums;
};

static void run(const struct part *p) {
    if (p->kind == SUMS)
        sums_of(p->x, p->other, p->output, p->first, p->last, p->channels, p->half, p->sums);
    else if (p->kind == APPLY)
        apply(p->x, p->other, p->first, p->last, p->channels, p->half, p->a, p->b, p->relu, p->out);
    else
        gradient_of(p->x, p->other, p->output, p->first, p->last, p->channels, p->half, p->a, p->b, p->c, p->out,
                    p->masked);
}

struct team {
    const struct part *parts;
    int64_t count;
    int (*number)(void), (*size)(void);
};

static void in_team(void *data) {
    const struct team *team = data;
    for (int64_t i = team->number(); i < team->count; i += team->size()) run(team->parts + i);
}

/* All parts, in the OpenMP threads whose functions are given (`parallel`: GOMP_parallel), one after another without. Threads
 * of our own would fight for cores with torch's, which go on spinning for a while after each of its operations. */
EXPORT void ssd_norm_run(const struct part *parts, int64_t count,
                         void (*parallel)(void (*)(void *), void *, unsigned, unsigned), int (*number)(void),
                         int (*size)(void)) {
    struct team team = {parts, count, number, size};
    if (parallel && count > 1)
        parallel(in_team, &team, (unsigned)count, 0);
    else
        for (int64_t i = 0; i < count; i++) run(parts + i);
}
