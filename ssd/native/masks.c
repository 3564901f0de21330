/* Rectangles of masked tokens, one crop after another: ssd/masking/shapes.py says the same for many crops at once, from
 * the same random numbers.
 */
#include <math.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define GAMMA 0x9E3779B97F4A7C15u

/* Number `count` of the stream `key`, in [0, 1): SplitMix64, as ssd/data/randomness.py has it. */
static inline double uniform(uint64_t key, uint64_t count) {
    uint64_t bits = key + GAMMA * (count + 1);
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    bits ^= bits >> 31;
    return (double)(bits >> 11) * 0x1p-53;
}

/* `wide` bits from `start` on; a row is one word, so grids are at most 64 tokens wide. */
static inline uint64_t span(int64_t start, int64_t wide) {
    uint64_t ones = wide >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << wide) - 1;
    return ones << start;
}

/* Masks (count, height, width) of at most `wanted` tokens each; width is at most 64, height too. */
EXPORT void ssd_blocks(const uint64_t *keys, const double *wanted, int64_t count, int64_t height, int64_t width,
                       double smallest, double largest, double spread, int64_t tries, uint8_t *masks) {
    for (int64_t n = 0; n < count; n++) {
        uint64_t rows[64] = {0};
        double hidden = 0;
        for (uint64_t drawn = 0; hidden < wanted[n];) {
            double left = wanted[n] - hidden < largest ? wanted[n] - hidden : largest;
            int64_t fresh = 0;
            for (int64_t attempt = 0; attempt < tries && !fresh; attempt++, drawn += 4) {
                double area = smallest + uniform(keys[n], drawn) * (left - smallest);
                double stretch = exp(spread * (2 * uniform(keys[n], drawn + 1) - 1));
                int64_t high = (int64_t)rint(sqrt(area * stretch)), wide = (int64_t)rint(sqrt(area / stretch));
                if (high >= height || wide >= width) continue;
                int64_t top = (int64_t)(uniform(keys[n], drawn + 2) * (double)(height - high + 1));
                int64_t start = (int64_t)(uniform(keys[n], drawn + 3) * (double)(width - wide + 1));
                uint64_t columns = span(start, wide);
                int64_t more = 0;
                for (int64_t y = top; y < top + high; y++) more += __builtin_popcountll(columns & ~rows[y]);
                if (more <= 0 || (double)more > left) continue;
                for (int64_t y = top; y < top + high; y++) rows[y] |= columns;
                fresh = more;
            }
            if (!fresh) break;
            /* whatever was not tried is passed over: rounds begin at the same places of the stream for everybody */
            drawn = (drawn + 4 * (uint64_t)tries - 1) / (4 * (uint64_t)tries) * (4 * (uint64_t)tries);
            hidden += (double)fresh;
        }
        uint8_t *mask = masks + n * height * width;
        for (int64_t y = 0; y < height; y++)
            for (int64_t x = 0; x < width; x++) mask[y * width + x] = rows[y] >> x & 1;
    }
}
