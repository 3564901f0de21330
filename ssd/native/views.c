/* Views of pictures on a CPU: crops resized as Pillow does it, and their colours.
 *
 * One thread a call, no state but scratch memory of each thread. Written for vectors of 16 floats in the compilers'
 * own notation, which become whatever the machine has. The torch code beside it (ssd/views/geometry.py and
 * photometry.py) says the same in fewer words and is what this is tested against.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LANES 16

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));
typedef uint32_t four_words __attribute__((vector_size(LANES)));
/* the same, where memory need not be aligned */
typedef float floats_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words_at __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef uint8_t bytes_at __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint32_t word_at __attribute__((aligned(1), may_alias));

#define EXPORT __attribute__((visibility("default")))
#define OUT_OF_MEMORY 1

/* ------------------------------------------------------------------ memory */

typedef struct {
    char *start;
    size_t size;
} scratch;

/* `size` bytes that stay with the thread, aligned for vectors; NULL where there are none. The content is lost. */
static void *room(scratch *memory, size_t size) {
    if (memory->size < size) {
        free(memory->start);
        memory->size = 0;
        memory->start = aligned_alloc(64, (size + 63) / 64 * 64);
        if (memory->start) memory->size = size;
    }
    return memory->start;
}

static inline int64_t padded(int64_t count) { return (count + 4 * LANES - 1) / (4 * LANES) * (4 * LANES); }
static inline int64_t lower(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t higher(int64_t a, int64_t b) { return a > b ? a : b; }

/* ------------------------------------------------------------------ resizing */

/* Which input pixels make an output pixel, and by what weights (`taps` places each, 0 beyond the last). */
typedef struct {
    int64_t taps;
    int32_t *first, *count;
    float *weights;
} filter;

static int64_t taps_of(int64_t from, int64_t to) {
    double scale = (double)from / to;
    return (int64_t)ceil(2.0 * (scale > 1 ? scale : 1)) * 2 + 1;
}

/* Catmull-Rom spline (a = -0.5), stretched over the input pixels where the picture shrinks: Pillow's BICUBIC. */
static void antialiased_bicubic(filter *f, int64_t from, int64_t to) {
    double scale = (double)from / to, stretch = scale > 1 ? scale : 1, support = 2.0 * stretch;
    float narrow = (float)(1 / stretch);
    f->taps = taps_of(from, to);
    for (int64_t i = 0; i < to; i++) {
        double center = (i + 0.5) * scale;
        int64_t first = higher((int64_t)(center - support + 0.5), 0);
        int64_t count = lower((int64_t)(center + support + 0.5), from) - first;
        float *w = f->weights + i * f->taps, offset = (float)(first - center + 0.5), sum = 0;
        for (int64_t k = 0; k < f->taps; k++) {
            float x = fabsf((k + offset) * narrow);
            float near = (1.5f * x - 2.5f) * x * x + 1, far = ((-0.5f * x + 2.5f) * x - 4) * x + 2;
            float v = x < 1 ? near : far;
            w[k] = (x < 2) & (k < count) ? v : 0;
        }
        for (int64_t k = 0; k < f->taps; k++) sum += w[k];
        for (int64_t k = 0; k < f->taps; k++) w[k] *= 1 / sum;
        f->first[i] = (int32_t)first;
        f->count[i] = (int32_t)count;
    }
}

/* 16 levels -> floats; sums of weighted levels -> the levels nearest to them, halves upwards; the low byte of each word.
 * Compilers take bytes apart one by one here, so the two commonest kinds of machine are told how. */
#if defined(__AVX512F__)
static inline floats as_floats(bytes x) { return (floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)x)); }
static inline bytes whole_levels(floats x) {
    __m512i level = _mm512_max_epi32(_mm512_cvttps_epi32((__m512)(x + 0.5f)), _mm512_setzero_si512());
    return (bytes)_mm512_cvtusepi32_epi8(level);
}
static inline bytes low_bytes(words x) { return (bytes)_mm512_cvtepi32_epi8((__m512i)x); }
#elif defined(__AVX2__)
static inline floats as_floats(bytes x) {
    __m256 half[2] = {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32((__m128i)x)),
                      _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)x, 8)))};
    floats all;
    memcpy(&all, half, sizeof all);
    return all;
}
static inline bytes whole_levels(floats x) {
    __m256 half[2];
    x += 0.5f;
    memcpy(half, &x, sizeof half);
    __m256i words16 = _mm256_packs_epi32(_mm256_cvttps_epi32(half[0]), _mm256_cvttps_epi32(half[1]));
    words16 = _mm256_permute4x64_epi64(words16, 0xD8);
    return (bytes)_mm_packus_epi16(_mm256_castsi256_si128(words16), _mm256_extracti128_si256(words16, 1));
}
static inline bytes low_bytes(words x) { return __builtin_convertvector(x & 255u, bytes); }
#else
static inline bytes low_bytes(words x) { return __builtin_convertvector(x & 255u, bytes); }
static inline floats as_floats(bytes x) {
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(x, shorts), ints), floats);
}
static inline bytes whole_levels(floats x) {
    ints level = __builtin_convertvector(x + 0.5f, ints);
    level &= level > 0;
    ints white = level > 255;
    return __builtin_convertvector((level & ~white) | (white & 255), bytes);
}
#endif

/* Four rows of up to four channels side by side: 16 floats a pixel, every `step` vectors. */
static void pack_rows(const uint8_t *rows[4], int64_t width, int64_t channels, int64_t used, int64_t readable,
                      int64_t step, floats *out) {
    int64_t fast = used >= 3 && (channels == 3 || channels == 4) ? lower(width, readable) : 0;
    for (int64_t x = 0; x < fast; x++) {
        int64_t at = x * channels;
        four_words px = {*(const word_at *)(rows[0] + at), *(const word_at *)(rows[1] + at),
                         *(const word_at *)(rows[2] + at), *(const word_at *)(rows[3] + at)};
        out[x * step] = as_floats((bytes)px);
    }
    for (int64_t x = fast; x < width; x++)
        for (int r = 0; r < 4; r++)
            for (int64_t c = 0; c < 4; c++) out[x * step][4 * r + c] = c < used ? rows[r][x * channels + c] : 0;
}

#define STRIP 8 /* rows that share the reading of weights */

static void rows_to_width(const uint8_t *source, int64_t stride, const uint8_t *end, int64_t height, int64_t width,
                          int64_t channels, int64_t used, const filter *f, int64_t to, floats *strip, uint8_t *out,
                          int64_t out_stride) {
    for (int64_t y = 0; y < height; y += STRIP) {
        for (int half = 0; half < 2; half++) {
            const uint8_t *rows[4];
            for (int r = 0; r < 4; r++) rows[r] = source + lower(y + 4 * half + r, height - 1) * stride;
            /* a pixel is read as four bytes, which must not reach beyond the picture's last */
            int64_t rest = end - rows[3], readable = rest < 4 ? 0 : (rest - 4) / channels + 1;
            pack_rows(rows, width, channels, used, readable, 2, strip + half);
        }
        for (int64_t x = 0; x < to; x++) {
            const float *w = f->weights + x * f->taps;
            const floats *from = strip + 2 * f->first[x];
            floats upper = {0}, lower = {0};
            for (int64_t k = 0, n = f->count[x]; k < n; k++, from += 2) {
                upper += from[0] * w[k];
                lower += from[1] * w[k];
            }
            bytes levels[2] = {whole_levels(upper), whole_levels(lower)};
            uint32_t px[STRIP];
            memcpy(px, levels, sizeof px);
            for (int r = 0; r < STRIP; r++) *(word_at *)(out + (y + r) * out_stride + 4 * x) = px[r];
        }
    }
}

static inline floats levels_at(const uint8_t *p) { return as_floats(*(const bytes_at *)p); }

/* From rows of four channels side by side to planes of `used` channels. */
static void columns_to_height(const uint8_t *rows, int64_t stride, const filter *f, int64_t width, int64_t to,
                              int64_t used, int flip, uint8_t *line, uint8_t *one, uint8_t *out) {
    for (int64_t y = 0; y < to; y++) {
        const float *w = f->weights + y * f->taps;
        const uint8_t *first = rows + f->first[y] * stride;
        for (int64_t x = 0; x < stride; x += 4 * LANES) {
            const uint8_t *from = first + x;
            floats a = {0}, b = {0}, c = {0}, d = {0};
            for (int64_t k = 0, n = f->count[y]; k < n; k++, from += stride) {
                a += levels_at(from) * w[k];
                b += levels_at(from + LANES) * w[k];
                c += levels_at(from + 2 * LANES) * w[k];
                d += levels_at(from + 3 * LANES) * w[k];
            }
            bytes *to_line = (bytes *)(line + x);
            to_line[0] = whole_levels(a), to_line[1] = whole_levels(b);
            to_line[2] = whole_levels(c), to_line[3] = whole_levels(d);
        }
        for (int64_t ch = 0; ch < used; ch++) {
            for (int64_t x = 0; x < width; x += LANES)
                *(bytes *)(one + x) = low_bytes(*(const words *)(line + 4 * x) >> (uint32_t)(8 * ch));
            uint8_t *restrict row = out + (ch * to + y) * width;
            if (flip) for (int64_t x = 0; x < width; x++) row[x] = one[width - 1 - x];
            else memcpy(row, one, width);
        }
    }
}

/* Crops of one picture, (height, width, channels) levels: `boxes` (count, 5) of left, top, width, height, flip;
 * crop v goes to `out` + v `out_stride` as (channels, size, size). Returns 0, or OUT_OF_MEMORY. */
EXPORT int ssd_crops(const uint8_t *picture, int64_t height, int64_t width, int64_t channels, const float *boxes,
                     int64_t count, int64_t size, uint8_t *out, int64_t out_stride) {
    static _Thread_local scratch memory;
    const uint8_t *end = picture + height * width * channels;
    int64_t stride = (4 * size + 63) / 64 * 64;
    for (int64_t v = 0; v < count; v++) {
        const float *box = boxes + 5 * v;
        int64_t left = (int64_t)box[0], top = (int64_t)box[1], wide = (int64_t)box[2], high = (int64_t)box[3];
        int64_t rows = (high + STRIP - 1) / STRIP * STRIP, taps_x = taps_of(wide, size), taps_y = taps_of(high, size);
        size_t need[] = {128 * (size_t)wide, (size_t)(stride * rows), 2 * (size_t)stride,
                         4 * (size_t)(size * (taps_x + taps_y)), 16 * (size_t)size};
        size_t all = 0;
        for (int i = 0; i < 5; i++) all += need[i] = (need[i] + 63) / 64 * 64;
        char *at = room(&memory, all);
        if (!at) return OUT_OF_MEMORY;
        floats *strip = (floats *)at;
        uint8_t *between = (uint8_t *)(at += need[0]), *line = (uint8_t *)(at += need[1]);
        float *weights = (float *)(at += need[2]);
        int32_t *places = (int32_t *)(at + need[3]);
        filter across = {0, places, places + size, weights};
        filter down = {0, places + 2 * size, places + 3 * size, weights + size * taps_x};
        antialiased_bicubic(&across, wide, size);
        antialiased_bicubic(&down, high, size);
        for (int64_t c = 0; c < channels; c += 4) {
            int64_t used = lower(channels - c, 4);
            const uint8_t *from = picture + (top * width + left) * channels + c;
            rows_to_width(from, width * channels, end, high, wide, channels, used, &across, size, strip, between, stride);
            columns_to_height(between, stride, &down, size, size, used, box[4] > 0, line, line + stride,
                              out + v * out_stride + c * size * size);
        }
    }
    return 0;
}

/* ------------------------------------------------------------------ colour */

enum { BRIGHTNESS, CONTRAST, SATURATION, HUE, FIRST, GREY = 8, BLUR, SOLARIZE, ROTATE, SHEAR, SETTINGS };

#define BLOCK 1024 /* pixels that are worked on while they are in the nearest cache */
#define REACH 5     /* deviations after which a Gaussian is cut off */
#define FURTHEST 512 /* px that it reaches at most */

static inline float clamped(float x) { return x < 0 ? 0 : x > 255 ? 255 : x; }

/* ITU-R BT.601 luma of three channels, the mean of other numbers of them. */
static void luma(float *const *planes, int64_t channels, int64_t count, float *restrict out) {
    if (channels == 3) {
        const float *restrict r = planes[0], *restrict g = planes[1], *restrict b = planes[2];
        for (int64_t i = 0; i < count; i++) out[i] = 0.299f * r[i] + 0.587f * g[i] + 0.114f * b[i];
        return;
    }
    memset(out, 0, count * sizeof(float));
    for (int64_t c = 0; c < channels; c++)
        for (int64_t i = 0; i < count; i++) out[i] += planes[c][i] / channels;
}

static void turn_hue(float *const *planes, int64_t count, float shift) {
    float *restrict red = planes[0], *restrict green = planes[1], *restrict blue = planes[2];
    for (int64_t i = 0; i < count; i++) {
        float r = red[i], g = green[i], b = blue[i];
        float value = r > g ? r : g, low = r < g ? r : g;
        value = value > b ? value : b;
        low = low < b ? low : b;
        float chroma = value - low, inverse = 1 / (chroma > 0 ? chroma : 1);
        /* in sixths of a turn: red 0, green 2, blue 4 */
        float from_red = (g - b) * inverse, from_green = (b - r) * inverse + 2, from_blue = (r - g) * inverse + 4;
        float hue = value == r ? from_red : value == g ? from_green : from_blue;
        hue += 6 * shift;
        hue -= 6 * floorf(hue * (1 / 6.0f));
        float share_red = fabsf(hue - 3) - 1, share_green = 2 - fabsf(hue - 2), share_blue = 2 - fabsf(hue - 4);
        share_red = share_red < 0 ? 0 : share_red > 1 ? 1 : share_red;
        share_green = share_green < 0 ? 0 : share_green > 1 ? 1 : share_green;
        share_blue = share_blue < 0 ? 0 : share_blue > 1 ? 1 : share_blue;
        red[i] = low + chroma * share_red;
        green[i] = low + chroma * share_green;
        blue[i] = low + chroma * share_blue;
    }
}

/* One operation of the jitter on `count` pixels; `level` is the picture's mean luma, for contrast. */
static void operate(int operation, float factor, float level, float *const *planes, int64_t channels, int64_t count,
                    float *grey) {
    if (operation == HUE) {
        turn_hue(planes, count, factor);
        return;
    }
    if (operation == SATURATION) {
        luma(planes, channels, count, grey);
        for (int64_t c = 0; c < channels; c++) {
            float *restrict x = planes[c];
            for (int64_t i = 0; i < count; i++) x[i] = clamped(factor * x[i] + (1 - factor) * grey[i]);
        }
        return;
    }
    float add = operation == CONTRAST ? (1 - factor) * level : 0;
    for (int64_t c = 0; c < channels; c++) {
        float *restrict x = planes[c];
        for (int64_t i = 0; i < count; i++) x[i] = clamped(factor * x[i] + add);
    }
}

/* Slanted, then turned about the centre; bilinear, edge pixels go on outside. */
static void warp(const float *restrict from, int64_t height, int64_t width, float angle, float slant,
                 float *restrict to) {
    float cosine = cosf(angle), sine = sinf(angle);
    /* in units of half the picture's side, as torch's affine_grid counts */
    float xx = cosine + slant * sine, xy = slant * cosine - sine, yx = sine, yy = cosine;
    for (int64_t i = 0; i < height; i++) {
        float v = (2 * i + 1) / (float)height - 1;
        for (int64_t j = 0; j < width; j++) {
            float u = (2 * j + 1) / (float)width - 1;
            float x = ((xx * u + xy * v + 1) * width - 1) / 2, y = ((yx * u + yy * v + 1) * height - 1) / 2;
            x = x < 0 ? 0 : x > width - 1 ? width - 1 : x;
            y = y < 0 ? 0 : y > height - 1 ? height - 1 : y;
            int32_t left = (int32_t)x, top = (int32_t)y;
            int32_t right = left + (left < width - 1), bottom = top + (top < height - 1);
            float a = x - left, b = y - top;
            float above = from[top * width + left] * (1 - a) + from[top * width + right] * a;
            float below = from[bottom * width + left] * (1 - a) + from[bottom * width + right] * a;
            to[i * width + j] = above * (1 - b) + below * b;
        }
    }
}

/* to[x] = the sum of lines[k][x] by their weights. */
static void weighted_sum(const float *const *lines, const float *weights, int64_t taps, int64_t width, float *to) {
    int64_t x = 0;
    for (; x + 4 * LANES <= width; x += 4 * LANES) {
        floats a = {0}, b = {0}, c = {0}, d = {0};
        for (int64_t k = 0; k < taps; k++) {
            const float *at = lines[k] + x;
            a += *(const floats_at *)at * weights[k];
            b += *(const floats_at *)(at + LANES) * weights[k];
            c += *(const floats_at *)(at + 2 * LANES) * weights[k];
            d += *(const floats_at *)(at + 3 * LANES) * weights[k];
        }
        *(floats_at *)(to + x) = a, *(floats_at *)(to + x + LANES) = b;
        *(floats_at *)(to + x + 2 * LANES) = c, *(floats_at *)(to + x + 3 * LANES) = d;
    }
    for (; x + LANES <= width; x += LANES) {
        floats a = {0};
        for (int64_t k = 0; k < taps; k++) a += *(const floats_at *)(lines[k] + x) * weights[k];
        *(floats_at *)(to + x) = a;
    }
    for (; x < width; x++) {
        float a = 0;
        for (int64_t k = 0; k < taps; k++) a += lines[k][x] * weights[k];
        to[x] = a;
    }
}

/* (height, width) in place by way of `between`, of the same size; `row` holds width + 2 radius. */
static void blur(float *plane, int64_t height, int64_t width, float deviation, float *between, float *row) {
    int64_t radius = lower(lower((int64_t)(REACH * deviation), higher(height, width)), FURTHEST);
    int64_t taps = 2 * radius + 1;
    float weights[2 * FURTHEST + 1], sum = 0;
    const float *lines[2 * FURTHEST + 1];
    for (int64_t k = -radius; k <= radius; k++) sum += weights[k + radius] = expf(-0.5f * k * k / (deviation * deviation));
    for (int64_t k = 0; k < taps; k++) weights[k] /= sum;
    for (int64_t k = 0; k < taps; k++) lines[k] = row + k;
    for (int64_t y = 0; y < height; y++) {
        const float *from = plane + y * width;
        for (int64_t x = 0; x < radius; x++) row[x] = from[0], row[radius + width + x] = from[width - 1];
        memcpy(row + radius, from, width * sizeof(float));
        weighted_sum(lines, weights, taps, width, between + y * width);
    }
    for (int64_t y = 0; y < height; y++) {
        for (int64_t k = 0; k < taps; k++) lines[k] = between + lower(higher(y + k - radius, 0), height - 1) * width;
        weighted_sum(lines, weights, taps, width, plane + y * width);
    }
}

/* Solarised and normalised, as float; or as whole levels where `scale` is NULL. */
static void finish(const float *restrict from, int64_t count, float threshold, const float *scale, const float *shift,
                   void *out) {
    if (scale) {
        float *restrict to = out, a = *scale, b = *shift;
        if (threshold > 255)
            for (int64_t i = 0; i < count; i++) to[i] = a * clamped(from[i]) - b;
        else
            for (int64_t i = 0; i < count; i++) {
                float x = clamped(from[i]);
                to[i] = a * (x >= threshold ? 255 - x : x) - b;
            }
        return;
    }
    uint8_t *restrict to = out;
    for (int64_t i = 0; i < count; i++) {
        float x = clamped(from[i]);
        to[i] = (uint8_t)((x >= threshold ? 255 - x : x) + 0.5f);
    }
}

static void jitter(const float *set, float *const *planes, int64_t channels, int64_t count, float *grey) {
    int order[4], number = 0, mean_before = -1;
    for (int i = 0; i < 4; i++) {
        int operation = (int)set[FIRST + i];
        if (set[operation] == (operation == HUE ? 0 : 1)) continue;
        if (channels != 3 && (operation == HUE || operation == SATURATION)) continue;
        if (operation == CONTRAST) mean_before = number;
        order[number++] = operation;
    }
    int drop_colour = channels == 3 && set[GREY] > 0;
    double sum = 0;
    for (int sweep = mean_before < 0; sweep < 2; sweep++) {
        int from = sweep == 0 || mean_before < 0 ? 0 : mean_before, to = sweep == 0 ? mean_before : number;
        if (from == to && sweep == 1 && !drop_colour) break;
        for (int64_t start = 0; start < count; start += BLOCK) {
            int64_t part = lower(BLOCK, count - start);
            float *at[channels];
            for (int64_t c = 0; c < channels; c++) at[c] = planes[c] + start;
            for (int i = from; i < to; i++)
                operate(order[i], set[order[i]], (float)(sum / count), at, channels, part, grey);
            if (sweep == 0) {
                luma(at, channels, part, grey);
                float total = 0;
                for (int64_t i = 0; i < part; i++) total += grey[i];
                sum += total;
            } else if (drop_colour) {
                luma(at, channels, part, grey);
                for (int64_t c = 0; c < 3; c++) memcpy(at[c], grey, part * sizeof(float));
            }
        }
    }
}

/* The colours of `count` pictures, (count, channels, height, width) levels, by `settings` (count, 13): to `out`, float
 * and level * scale - shift of each channel, or levels where `scale` is NULL. Returns 0, or OUT_OF_MEMORY. */
EXPORT int ssd_photometry(const uint8_t *pictures, int64_t count, int64_t channels, int64_t height, int64_t width,
                          const float *settings, const float *scale, const float *shift, void *out) {
    static _Thread_local scratch memory;
    int64_t pixels = height * width, plane = padded(pixels);
    int64_t line = padded(width + 2 * lower(higher(height, width), FURTHEST) + 4 * LANES);
    float *levels = room(&memory, ((channels + 1) * plane + line + BLOCK) * sizeof(float));
    if (!levels) return OUT_OF_MEMORY;
    float *between = levels + channels * plane, *row = between + plane, *grey = row + line;
    float *planes[channels];
    for (int64_t n = 0; n < count; n++) {
        const uint8_t *picture = pictures + n * channels * pixels;
        const float *set = settings + n * SETTINGS;
        for (int64_t c = 0; c < channels; c++) {
            float *restrict to = planes[c] = levels + c * plane;
            const uint8_t *restrict from = picture + c * pixels;
            for (int64_t i = 0; i < pixels; i++) to[i] = from[i];
            if (set[ROTATE] != 0 || set[SHEAR] != 0) {
                warp(to, height, width, set[ROTATE], set[SHEAR], between);
                memcpy(to, between, pixels * sizeof(float));
            }
        }
        jitter(set, planes, channels, pixels, grey);
        for (int64_t c = 0; c < channels; c++) {
            int64_t place = (n * channels + c) * pixels;
            if (set[BLUR] > 0) blur(planes[c], height, width, set[BLUR], between, row);
            finish(planes[c], pixels, set[SOLARIZE], scale ? scale + c : NULL, shift ? shift + c : NULL,
                   (char *)out + place * (scale ? sizeof(float) : 1));
        }
    }
    return 0;
}
