/* Batch norm, max-pool 2 x 2 and ReLU of a convolution's output, forward and backward, for
   pooled.py. Images are channels-last: (rows, height, width, channels), channels a multiple of
   LANES; numbers are float, or bfloat16 as uint16_t, and float in registers. Included twice by
   itself, once for each type. Sums go over a line in float, then on in double. */

#ifndef NUMBER

#include <stdint.h>
#include <string.h>

#ifndef LANES
#define LANES 16
#endif
#if LANES > 8 && defined __x86_64__ && !defined __AVX512F__
#undef LANES
#define LANES 8                 /* gcc takes vectors wider than the registers to pieces */
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

typedef struct {
    int64_t rows, height, width, channels;
} Size;

enum { SHUT = 4 };              /* in place of a window's maximum: ReLU let nothing through */

static inline floats load_float(const float *p) { floats v; memcpy(&v, p, sizeof v); return v; }
static inline void store_float(float *p, floats v) { memcpy(p, &v, sizeof v); }
static inline floats load_bfloat16(const uint16_t *p)
{
    halves half;
    memcpy(&half, p, sizeof half);
    return (floats)(__builtin_convertvector(half, bits) << 16);
}
static inline void store_bfloat16(uint16_t *p, floats v)
{
    bits b = (bits)v;
    b += 0x7fff + ((b >> 16) & 1);                  /* to the nearest, ties to even */
    halves half = __builtin_convertvector(b >> 16, halves);
    memcpy(p, &half, sizeof half);
}
static inline floats choose(ints yes, floats a, floats b)
{
    return (floats)(((ints)a & yes) | ((ints)b & ~yes));
}

#define JOIN(name, type) name##_##type
#define NAMED(name, type) JOIN(name, type)
#define NUMBER float
#define KIND float
#include "block.c"
#undef NUMBER
#undef KIND
#define NUMBER uint16_t
#define KIND bfloat16
#include "block.c"

#else

#define LOAD NAMED(load, KIND)
#define STORE NAMED(store, KIND)

/* sums (2, C) of x - pivot and of its square: near the mean nothing cancels */
void NAMED(moments, KIND)(const NUMBER *x, const Size *s, const float *pivot, double *sums)
{
    const int64_t C = s->channels, lines = s->rows * s->height;
    memset(sums, 0, 2 * C * sizeof(double));
    for (int64_t line = 0; line < lines; line++) {
        const NUMBER *p = x + line * s->width * C;
        for (int64_t c = 0; c < C; c += LANES) {
            const floats zero = load_float(pivot + c);
            floats sum[2] = {{0}}, square[2] = {{0}};   /* two: an addition waits for the last */
            for (int64_t w = 0; w < s->width; w++) {
                floats v = LOAD(p + w * C + c) - zero;
                sum[w % 2] += v;
                square[w % 2] += v * v;
            }
            for (int k = 0; k < LANES; k++) {
                sums[c + k] += sum[0][k] + sum[1][k];
                sums[C + c + k] += square[0][k] + square[1][k];
            }
        }
    }
}

/* out = ReLU(max-pool(scale x + shift)), (rows, height / 2, width / 2, C); best: x at each maximum,
   which: its place of four, or SHUT */
void NAMED(pool, KIND)(const NUMBER *x, const Size *s, const float *scale, const float *shift,
                       NUMBER *out, NUMBER *best, uint8_t *which)
{
    const int64_t C = s->channels, line = s->width * C;
    const int64_t high = s->height / 2, wide = s->width / 2;
    for (int64_t r = 0; r < s->rows; r++)
        for (int64_t h = 0; h < high; h++) {
            const NUMBER *p = x + (r * s->height + 2 * h) * line;
            const int64_t at = (r * high + h) * wide * C;
            for (int64_t c = 0; c < C; c += LANES) {
                const floats a = load_float(scale + c), b = load_float(shift + c);
                const ints falls = a < 0;            /* there a minimum becomes the maximum */
                for (int64_t w = 0; w < wide; w++) {
                    const NUMBER *q = p + 2 * w * C + c;
                    const floats four[4] = {LOAD(q), LOAD(q + C), LOAD(q + line), LOAD(q + line + C)};
                    floats top = four[0];
                    ints place = {0};
                    for (int k = 1; k < 4; k++) {
                        ints more = (falls & (four[k] < top)) | (~falls & (four[k] > top));
                        top = choose(more, four[k], top);
                        place = (place & ~more) | (k & more);
                    }
                    floats y = a * top + b;
                    ints shut = y <= 0;              /* not so of a NaN, which goes through */
                    place = (place & ~shut) | (SHUT & shut);
                    STORE(out + at + w * C + c, choose(shut, (floats){0}, y));
                    STORE(best + at + w * C + c, top);
                    bytes small = __builtin_convertvector(place, bytes);
                    memcpy(which + at + w * C + c, &small, sizeof small);
                }
            }
        }
}

/* sums (2, C) of the gradient that ReLU lets through, and of it times x at the maxima */
void NAMED(gradient_sums, KIND)(const NUMBER *grad, const NUMBER *best, const uint8_t *which,
                                const Size *s, double *sums)
{
    const int64_t C = s->channels, wide = s->width / 2, lines = s->rows * (s->height / 2);
    memset(sums, 0, 2 * C * sizeof(double));
    for (int64_t line = 0; line < lines; line++)
        for (int64_t c = 0; c < C; c += LANES) {
            floats sum = {0}, product = {0};
            for (int64_t w = 0; w < wide; w++) {
                const int64_t at = (line * wide + w) * C + c;
                bytes place;
                memcpy(&place, which + at, sizeof place);
                ints open = __builtin_convertvector(place, ints) != SHUT;
                floats g = choose(open, LOAD(grad + at), (floats){0});
                sum += g;
                product += g * LOAD(best + at);
            }
            for (int k = 0; k < LANES; k++) {
                sums[c + k] += sum[k];
                sums[C + c + k] += product[k];
            }
        }
}

/* of_x = offset + slope x, and scale times the gradient at each maximum */
void NAMED(spread, KIND)(const NUMBER *grad, const NUMBER *x, const uint8_t *which, const Size *s,
                         const float *scale, const float *slope, const float *offset, NUMBER *of_x)
{
    const int64_t C = s->channels, line = s->width * C;
    const int64_t high = s->height / 2, wide = s->width / 2;
    for (int64_t r = 0; r < s->rows; r++)
        for (int64_t h = 0; h < s->height; h++)
            for (int64_t c = 0; c < C; c += LANES) {
                const int64_t from = (r * s->height + h) * line + c;
                const int64_t pooled = ((r * high + h / 2) * wide) * C + c;
                const floats a = load_float(scale + c);
                const floats k1 = load_float(slope + c), k0 = load_float(offset + c);
                const int64_t in_windows = h / 2 < high ? 2 * wide : 0;
                for (int64_t w = 0; w < in_windows; w += 2) {
                    bytes place;
                    memcpy(&place, which + pooled + w / 2 * C, sizeof place);
                    const ints chosen = __builtin_convertvector(place, ints);
                    const floats g = a * LOAD(grad + pooled + w / 2 * C);
                    for (int k = 0; k < 2; k++) {
                        const int64_t at = from + (w + k) * C;
                        const ints here = chosen == (int32_t)(2 * (h % 2) + k);
                        STORE(of_x + at, k0 + k1 * LOAD(x + at) + choose(here, g, (floats){0}));
                    }
                }
                for (int64_t w = in_windows; w < s->width; w++)
                    STORE(of_x + from + w * C, k0 + k1 * LOAD(x + from + w * C));
            }
}

#undef LOAD
#undef STORE

#endif
