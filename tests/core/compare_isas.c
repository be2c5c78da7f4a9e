/* Runs the kernels of two instruction sets on the same numbers and compares them: bytes where they must be equal, sums
 * to rounding. Prints how many comparisons were made; exits with 1 at the first difference.
 * Built for another architecture and run under an emulator by test_neon.py. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/core/kernels/table.h"
#include "../../csrc/core/scheme.h"

#define X(name) extern const bw_isa bw_isa_##name;
BW_ISA_LIST
#undef X

#define X(name) &bw_isa_##name,
static const bw_isa *const isas[] = {BW_ISA_LIST};
#undef X

enum { COLS = 333, PADDED = 336 };

static int n_compared;

static void expect(int equal, const char *what, const bw_scheme *scheme) {
    n_compared++;
    if (equal) return;
    printf("%s differs: levels %d, group %d, symmetric %d\n", what, (int)scheme->levels, (int)scheme->group_size,
           (int)scheme->symmetric);
    exit(1);
}

static int near(double x, double y) {
    return x == y || fabs(x - y) <= 1e-6 * fabs(y);
}

/* Everything that two sets made of one row. */
typedef struct {
    uint16_t scales[2][PADDED];
    float zeros[2][PADDED], wide[2][PADDED], range_zeros[2][PADDED], values[2][PADDED], low[2][PADDED], high[2][PADDED];
    uint8_t codes[2][PADDED], packed[2][PADDED], back[2][PADDED], halves[2][2 * PADDED];
} results;

static void compare_schemes(const float *w, const float *importance, const bw_scheme *scheme) {
    static results r;
    float errors[2];
    ptrdiff_t group = scheme->group_size < 0 ? COLS : (ptrdiff_t)scheme->group_size, n = (COLS - 1) / group + 1;
    for (int clip = 0; clip < 2; clip++) {
        memset(&r, 0, sizeof r);
        for (int k = 0; k < 2; k++) {
            const bw_isa *isa = isas[k];
            if (clip) isa->clip_grid(w, COLS, group, scheme, importance, r.scales[k], r.zeros[k]);
            else isa->rtn_grid(w, COLS, group, scheme, r.scales[k], r.zeros[k]);
            isa->encode_row(w, COLS, group, scheme->levels, r.scales[k], r.zeros[k], r.codes[k]);
            isa->pack(r.codes[k], COLS, scheme->levels, r.packed[k]);
            isa->unpack(r.packed[k], COLS, scheme->levels, r.back[k]);
            isa->decode_row(r.back[k], COLS, group, r.scales[k], r.zeros[k], BW_F32, r.values[k]);
            isa->store(r.values[k], COLS, clip ? BW_F16 : BW_BF16, r.halves[k]);
            const bw_matrix m = {r.scales[k], 1, n, n, 1, BW_F16};
            isa->load_row(&m, 0, 0, n, r.wide[k]);
            errors[k] = isa->grid_error(w, importance, COLS, group, scheme->levels, r.wide[k], r.zeros[k]);
            isa->find_ranges(w, COLS, r.low[k], r.high[k]);
            isa->range_grid(r.low[k], r.high[k], 16, scheme, r.wide[k], r.range_zeros[k]);
        }
        expect(!memcmp(r.scales[0], r.scales[1], sizeof r.scales[0]), clip ? "clip scales" : "rtn scales", scheme);
        expect(!memcmp(r.zeros[0], r.zeros[1], sizeof r.zeros[0]), clip ? "clip zeros" : "rtn zeros", scheme);
        expect(!memcmp(r.codes[0], r.codes[1], COLS), "codes", scheme);
        expect(!memcmp(r.packed[0], r.packed[1], PADDED), "packed codes", scheme);
        expect(!memcmp(r.back[1], r.codes[0], COLS), "unpacked codes", scheme);
        expect(!memcmp(r.values[0], r.values[1], sizeof r.values[0]), "values", scheme);
        expect(!memcmp(r.halves[0], r.halves[1], 2 * COLS), "16-bit values", scheme);
        expect(!memcmp(r.wide[0], r.wide[1], sizeof r.wide[0]), "range scales", scheme);
        expect(!memcmp(r.range_zeros[0], r.range_zeros[1], sizeof r.zeros[0]), "range zeros", scheme);
        expect(near(errors[0], errors[1]), "error", scheme);
    }
}

static void compare_losses(const float *a, const float *b) {
    const bw_scheme none = {0};
    double sums[2][3] = {{0}};
    float largest[2], sum[2];
    for (int k = 0; k < 2; k++) {
        largest[k] = isas[k]->block_max(a, PADDED);
        sum[k] = isas[k]->block_exp(a, PADDED, largest[k]);
        isas[k]->block_kl(a, b, PADDED, largest[k], isas[k]->block_max(b, PADDED), sums[k]);
    }
    expect(largest[0] == largest[1], "largest", &none);
    expect(near(sum[0], sum[1]), "sum of exponentials", &none);
    for (int i = 0; i < 3; i++) expect(fabs(sums[0][i] - sums[1][i]) <= 1e-5 * fabs(sums[1][i]), "KL sums", &none);
}

int main(void) {
    static float w[PADDED], importance[PADDED], b[PADDED];
    const int64_t groups[] = {16, 32, 64, 128, -1};
    uint32_t state = 1;
    for (int row = 0; row < 2; row++) {
        for (int i = 0; i < COLS; i++) {
            float sum = 0;
            for (int j = 0; j < 6; j++) sum += (float)((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-24f - 0.5f;
            w[i] = sum * (row ? 1e-7f : 1.0f + (float)(i % 7 == 0));
            importance[i] = sum * sum;
            b[i] = w[i] + 0.1f * sum;
        }
        for (int l = 0; l < BW_N_LEVELS; l++)
            for (int s = 0; s < 10; s++) {
                const bw_scheme scheme = {bw_all_levels[l], s % 2, groups[s / 2]};
                compare_schemes(w, importance, &scheme);
            }
        float x[PADDED], y[PADDED];
        for (int i = 0; i < PADDED; i++) x[i] = i < COLS ? 5 * w[i] : -INFINITY, y[i] = i < COLS ? 5 * b[i] : -INFINITY;
        compare_losses(x, y);
    }
    printf("%s and %s agree in %d comparisons\n", isas[0]->name, isas[1]->name, n_compared);
    return 0;
}
