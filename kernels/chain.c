/* The chain's loops on one core of a CPU, for compiled.py: what the torch operations of splice.py
   and filters.py spend most of their time on, each in one pass over memory. No libraries; vectors
   of 16 float, which any compiler with GCC's extensions lowers to what the CPU has. Rows do not
   depend on each other. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float v16 __attribute__((vector_size(64)));
typedef double v8 __attribute__((vector_size(64)));

static inline v16 load(const float *p) { v16 v; memcpy(&v, p, 64); return v; }
static inline void store(float *p, v16 v) { memcpy(p, &v, 64); }

/* ---- the pitch shift: see augment.Splicing for the names */

typedef struct {
    int64_t rows, size, blocks, segments, hop, fade, first, search, lags, block, fractions;
    double drift;
} Plan;

enum { TILE = 7, TAPS = 32, SHORT_TAPS = 12 };      /* TILE vectors of lags at once */

/* the sum of x^2, of n numbers */
static double energy_of(const float *x, int64_t n)
{
    double sum[8] = {0}, total = 0;                 /* apart: a sum waits for itself */
    for (int64_t i = 0; i < n; i++) sum[i % 8] += (double)x[i] * x[i];
    for (int k = 0; k < 8; k++) total += sum[k];
    return total;
}

/* norm 1; what would come next, read between the samples */
static void continuation(const float *audio, const float *weights, int64_t fade, float *template)
{
    for (int64_t i = 0; i < fade; i += 16) {
        v16 sum = {0};
        for (int tap = 0; tap < SHORT_TAPS; tap++)
            sum += weights[tap] * load(audio + i + tap - (SHORT_TAPS / 2 - 1));
        store(template + i, sum);
    }
    float scale = 1 / fmaxf(sqrt(energy_of(template, fade)), 1e-4f);
    for (int64_t i = 0; i < fade; i++) template[i] *= scale;
}

/* match[lag] = the product of the template with the audio at this lag */
static void correlate(const float *audio, const float *template, const Plan *p, float *match)
{
    for (int64_t lag = 0; lag < p->lags; lag += 16 * TILE) {
        v16 sum[TILE] = {0};
        for (int64_t i = 0; i < p->fade; i++)
            for (int k = 0; k < TILE; k++)
                sum[k] += template[i] * load(audio + lag + i + 16 * k);
        for (int k = 0; k < TILE; k++) store(match + lag + 16 * k, sum[k]);
    }
}

/* each match divided by the norm of its candidate, by a running sum */
static void normalise(const float *audio, const Plan *p, float *match, float *energy)
{
    double sum = energy_of(audio, p->fade);
    for (int64_t lag = 0; lag < p->lags; lag++) {
        energy[lag] = sum;
        float first = audio[lag], next = audio[lag + p->fade];
        sum += (double)next * next - (double)first * first;
    }
    for (int64_t lag = 0; lag < p->lags; lag++)
        match[lag] /= sqrtf(energy[lag] > 1e-8f ? energy[lag] : 1e-8f);
}

static int64_t next_start(const float *audio, const float *attacks, const float *table,
                          const Plan *p, int64_t ahead, int64_t begin, float *scratch)
{
    float *template = scratch, *match = template + p->fade + 16;
    int64_t whole = ahead / p->fractions, here = whole / p->block, best_lag = 0;
    continuation(audio + whole, table + ahead % p->fractions * SHORT_TAPS, p->fade, template);
    correlate(audio + begin, template, p, match);
    normalise(audio + begin, p, match, match + p->lags + 16 * TILE);
    float best = INFINITY, best_cut = 0;
    for (int64_t q = 0; q < p->lags / p->block; q++) {
        /* attacks lost or heard twice: up to the later end of both, from the earlier beginning */
        int64_t there = (begin + q * p->block) / p->block;
        int64_t end = (here + 3 > there + 2 ? here + 3 : there + 2) + p->fade / p->block;
        float cut = attacks[end] - attacks[here - 1 < there ? here - 1 : there];
        for (int64_t lag = q * p->block; lag < (q + 1) * p->block; lag++) {
            float far = (float)lag / p->search - 1;
            float cost = cut + 1e-5f * far * far - match[lag];
            if (cost < best) { best = cost; best_lag = lag; best_cut = cut; }
        }
    }
    if (best_cut > 0.2f && llabs(whole - (begin + p->search)) < p->drift)
        return (ahead + p->fractions / 2) / p->fractions;      /* hold: no splice here */
    return begin + best_lag;
}

/* starts (rows, segments), of which the first of each row is given */
void search(const Plan *p, const float *audio, const float *attacks, const float *table,
            const int64_t *step, int64_t *starts, float *scratch)
{
    for (int64_t row = 0; row < p->rows; row++) {
        int64_t *start = starts + row * p->segments;
        for (int64_t s = 1; s < p->segments; s++)
            start[s] = next_start(audio + row * p->size, attacks + row * p->blocks, table, p,
                                  step[row] + start[s - 1] * p->fractions,
                                  p->first + s * p->hop, scratch);
    }
}

/* 16 neighbouring outputs of every segment: a product with a banded matrix, which they share */
static void read_group(const Plan *p, const float *audio, const int64_t *start, double ratio,
                       const float *weights, int64_t j, float *pieces, int64_t length)
{
    float band[80][16] = {{0}};
    int64_t first = floor(j * ratio), whole = first;
    for (int lane = 0; lane < 16; lane++) {
        double position = (j + lane) * ratio;
        whole = floor(position);
        const float *w = weights + lrintf((float)(position - whole) * p->fractions) * TAPS;
        for (int tap = 0; tap < TAPS; tap++) band[whole - first + tap][lane] = w[tap];
    }
    audio += first - (TAPS / 2 - 1);
    for (int64_t s = 0; s < p->segments; s += 4) {
        const float *a[4];
        v16 sum[4] = {0};
        for (int k = 0; k < 4; k++) a[k] = audio + start[s + k < p->segments ? s + k : s];
        for (int64_t i = 0; i < whole - first + TAPS; i++) {
            v16 column = load(band[i]);
            for (int k = 0; k < 4; k++) sum[k] += column * a[k][i];
        }
        for (int k = 0; k < 4 && s + k < p->segments; k++)
            store(pieces + (s + k) * length + j, sum[k]);
    }
}

/* out (rows, segments hop): the segments read and laid together; scratch: segments x length */
void lay(const Plan *p, const float *audio, const int64_t *starts, const double *ratio,
         const float *weights, const float *fade_in, float *out, float *scratch)
{
    int64_t length = (p->hop + p->fade + 15) / 16 * 16;
    for (int64_t row = 0; row < p->rows; row++) {
        for (int64_t j = 0; j < length; j += 16)
            read_group(p, audio + row * p->size, starts + row * p->segments, ratio[row], weights,
                       j, scratch, length);
        for (int64_t s = 0; s < p->segments; s++) {
            float *y = out + (row * p->segments + s) * p->hop, *piece = scratch + s * length;
            memcpy(y, piece, p->hop * sizeof(float));
            const float *before = piece - length + p->hop;
            for (int64_t i = 0; s && i < p->fade; i++)
                y[i] = before[i] + fade_in[i] * (piece[i] - before[i]);
        }
    }
}

/* ---- rooms: spectrum (rows, bins) complex, times the response of Freeverb: see filters.py */

enum { COMBS = 8, COLUMNS = 256 };

/* of COLUMNS bins: f is the reciprocal gain around a comb's loop, and a = z^-D an outer product of
   coarse and fine; wet = ((sum of f / (f - a)) - 8) f times the all-passes */
static void response(const float *coarse, int64_t stride, const float fine[2][COMBS][COLUMNS],
                     const float *f_re, const float *f_im, const float *passes_re,
                     const float *passes_im, float *wet_re, float *wet_im)
{
    for (int b = 0; b < COLUMNS; b += 16) {
        v16 fr = load(f_re + b), fi = load(f_im + b), sr = {0}, si = {0};
        for (int c = 0; c < COMBS; c++) {
            float cr = coarse[c * stride], ci = coarse[c * stride + 1];
            v16 gr = load(fine[0][c] + b), gi = load(fine[1][c] + b);
            v16 re = fr - (cr * gr - ci * gi), im = fi - (cr * gi + ci * gr);
            v16 scale = 1 / (re * re + im * im);
            sr += re * scale;
            si -= im * scale;
        }
        v16 tr = sr * fr - si * fi - COMBS, ti = sr * fi + si * fr;
        v16 ur = tr * fr - ti * fi, ui = tr * fi + ti * fr;
        v16 pr = load(passes_re + b), pi = load(passes_im + b);
        store(wet_re + b, ur * pr - ui * pi);
        store(wet_im + b, ur * pi + ui * pr);
    }
}

/* coarse (rows, 8, A) and fine (rows, 8, COLUMNS) complex; one_sample and passes (2, A, COLUMNS) */
void rooms(float *spectrum, int64_t rows, int64_t bins, const float *coarse, const float *fine,
           const float *one_sample, const float *passes, const float *direct, const float *damped)
{
    int64_t lines = bins / COLUMNS + 1, plane = lines * COLUMNS;
    float split[2][COMBS][COLUMNS], f[2][COLUMNS], wet[2][COLUMNS];
    for (int64_t row = 0; row < rows; row++) {
        for (int c = 0; c < COMBS; c++)
            for (int i = 0; i < 2 * COLUMNS; i++)
                split[i % 2][c][i / 2] = fine[(row * COMBS + c) * COLUMNS * 2 + i];
        for (int64_t line = 0; line < lines; line++) {
            const float *z = one_sample + line * COLUMNS, *p = passes + line * COLUMNS;
            for (int b = 0; b < COLUMNS; b++) {
                f[0][b] = direct[row] - damped[row] * z[b];
                f[1][b] = -damped[row] * z[plane + b];
            }
            response(coarse + (row * COMBS * lines + line) * 2, lines * 2, split, f[0], f[1], p,
                     p + plane, wet[0], wet[1]);
            float *x = spectrum + (row * bins + line * COLUMNS) * 2;
            int64_t count = bins - line * COLUMNS < COLUMNS ? bins - line * COLUMNS : COLUMNS;
            for (int64_t b = 0; b < count; b++) {
                float re = x[2 * b], im = x[2 * b + 1];
                x[2 * b] = re * wet[0][b] - im * wet[1][b];
                x[2 * b + 1] = re * wet[1][b] + im * wet[0][b];
            }
        }
    }
}

/* ---- second-order filters: b0, b1, b2, a1, a2 of each row; 8 rows at once, as the recursion waits
   for itself */

void recurse(const float *x, float *y, const double *coefficients, int64_t rows, int64_t total)
{
    for (int64_t row = 0; row < rows; row += 8) {
        const float *in[8];
        float *out[8];
        v8 b0, b1, b2, a1, a2, s1 = {0}, s2 = {0};
        for (int k = 0; k < 8; k++) {
            int64_t r = row + k < rows ? row + k : row;
            const double *c = coefficients + 5 * r;
            in[k] = x + r * total;
            out[k] = y + r * total;
            b0[k] = c[0]; b1[k] = c[1]; b2[k] = c[2]; a1[k] = c[3]; a2[k] = c[4];
        }
        for (int64_t t = 0; t < total; t++) {
            v8 u, v;
            for (int k = 0; k < 8; k++) u[k] = in[k][t];
            v = b0 * u + s1;
            s1 = b1 * u - a1 * v + s2;
            s2 = b2 * u - a2 * v;
            for (int k = 7; k >= 0; k--) out[k][t] = v[k];
            if (t % 1024 == 0)                      /* numbers near 0 are slow to compute with */
                for (int k = 0; k < 8; k++)
                    if (fabs(s1[k]) + fabs(s2[k]) < 1e-30) s1[k] = s2[k] = 0;
        }
    }
}
