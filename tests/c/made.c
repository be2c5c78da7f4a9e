#include "made.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memory.h"

unsigned draw(tape *t, unsigned below) {
    unsigned value = 0;
    for (unsigned span = 1; span < below && t->at < t->end; span <<= 8) value = value << 8 | *t->at++;
    return value % below;
}

uint64_t step_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

size_t width_of(bw_dtype dtype) {
    return dtype == BW_F32 ? 4 : 2;
}

void broken(const char *what) {
    fprintf(stderr, "promise broken: %s\n", what);
    abort();
}

ptrdiff_t draw_size(tape *t, unsigned most) {
    static const ptrdiff_t hostile[] = {-1,
                                        PTRDIFF_MIN,
                                        PTRDIFF_MAX,
                                        PTRDIFF_MAX / 2,
                                        PTRDIFF_MAX / 8 + 1,
                                        (ptrdiff_t)1 << 32,
                                        (ptrdiff_t)1 << 62,
                                        ((ptrdiff_t)1 << 31) - 1};
    if (draw(t, 64) == 63) return hostile[draw(t, 8)];
    return (ptrdiff_t)draw(t, most + 1);
}

ptrdiff_t larger(ptrdiff_t n, ptrdiff_t by) {
    return (ptrdiff_t)((size_t)n + (size_t)by);
}

bw_scheme draw_scheme(tape *t) {
    static const int32_t levels[] = {2, 3, 4, 8, 16, 32, 64, 256},
                         odd_levels[] = {0, -1, 5, 128, 257, INT32_MAX, INT32_MIN};
    static const int64_t groups[] = {16, 32, 64, 128, -1}, odd_groups[] = {0, -2, 7, 256, INT64_MAX, INT64_MIN};
    bw_scheme s = {levels[draw(t, 8)], (int32_t)draw(t, 2), groups[draw(t, 5)]};
    unsigned odd = draw(t, 64);
    if (odd == 62) s.levels = odd_levels[draw(t, 7)];
    if (odd == 63) s.group_size = odd_groups[draw(t, 6)];
    return s;
}

static uint16_t half(uint64_t random) {
    return (uint16_t)((random & 0x83ff) | (0x2c00 + (random >> 20 & 0x0c00)));
}

void fill_floats(tape *t, void *memory, ptrdiff_t n, bw_dtype dtype) {
    unsigned kind = draw(t, 8);
    uint64_t random = 0x9e3779b97f4a7c15u ^ ((uint64_t)draw(t, 65536) + 1);
    static const float odd[] = {0.0f, -0.0f, 1e-40f, 1e-30f, 1e30f, 3e38f, NAN, -INFINITY};
    float constant = odd[draw(t, 8)];
    for (ptrdiff_t i = 0; i < n; i++) {
        uint64_t r = step_random(&random);
        float value = ((float)(r >> 40) / 8388608.0f - 1.0f) * 0.3f;
        if (kind == 1 || (kind == 2 && !(r & 63))) value = odd[r >> 8 & 7];
        if (kind == 3) value = constant;
        if (kind == 4 && !(r & 15)) value = constant;
        if (kind == 5) value = fabsf(value);
        uint32_t bits;
        memcpy(&bits, &value, 4);
        if (kind == 6) bits = (uint32_t)r;
        uint16_t narrow = dtype == BW_BF16 || kind == 6 ? (uint16_t)(bits >> 16) : half(r);
        if (dtype == BW_F32) memcpy((char *)memory + 4 * i, &bits, 4);
        else memcpy((char *)memory + 2 * i, &narrow, 2);
    }
}

void fill_bytes(tape *t, void *memory, ptrdiff_t n) {
    uint64_t random = (uint64_t)draw(t, 65536) + 77;
    for (ptrdiff_t i = 0; i < n; i++) ((uint8_t *)memory)[i] = (uint8_t)(step_random(&random) >> 24);
}

bw_matrix draw_view(tape *t, ptrdiff_t rows, ptrdiff_t cols) {
    bw_matrix m = {NULL, rows, cols, 0, 0, (bw_dtype)draw(t, 3)};
    unsigned odd = draw(t, 64);
    if (odd == 63) m.dtype = (bw_dtype)7;
    ptrdiff_t width = (ptrdiff_t)width_of(m.dtype), span = 1, first = 0, n;
    int small = rows >= 0 && cols >= 0 && !__builtin_mul_overflow(rows, cols, &n) && n <= MOST_BYTES / 8;
    switch (draw(t, 6)) {
    case 0: m.row_stride = 1, m.col_stride = rows; break;
    case 1: m.row_stride = (ptrdiff_t)-(size_t)cols, m.col_stride = 1; break;
    case 2: m.row_stride = (ptrdiff_t)((size_t)cols + 3), m.col_stride = 1; break;
    case 3: m.row_stride = 0, m.col_stride = draw(t, 2); break;
    default: m.row_stride = cols, m.col_stride = 1;
    }
    if (!small) m.row_stride = draw(t, 2) ? PTRDIFF_MAX / 2 : 1;
    if (small && n) {
        ptrdiff_t down = (rows - 1) * m.row_stride, across = (cols - 1) * m.col_stride;
        span = 1 + (down < 0 ? -down : down) + (across < 0 ? -across : across);
        first = (down < 0 ? -down : 0) + (across < 0 ? -across : 0);
    }
    int shift = (int)draw(t, 4) == 3; /* not aligned */
    char *memory = (char *)take((size_t)(span * width + shift)) + shift;
    fill_floats(t, memory, span, m.dtype);
    m.data = odd == 62 ? NULL : memory + first * width;
    if (!small && !bw_check_matrix(&m)) m.data = NULL; /* legal, but more than a test may take */
    return m;
}

float *draw_array(tape *t, ptrdiff_t n) {
    if (n < 0 || n > MOST_BYTES / 4) n = 0;
    float *memory = take((size_t)n * 4);
    fill_floats(t, memory, n, BW_F32);
    return draw(t, 64) == 63 ? NULL : memory;
}

bw_quantized room_for(bw_scheme s, ptrdiff_t rows, ptrdiff_t cols, bw_layout *layout, int *too_large) {
    memset(layout, 0, sizeof *layout);
    bw_status status = bw_scheme_layout(&s, rows, cols, layout);
    *too_large = !status && layout->n_bytes > MOST_BYTES;
    if (status || *too_large) memset(layout, 0, sizeof *layout);
    int none = status || *too_large;
    bw_quantized q = {take(none ? 0 : (size_t)(layout->row_bytes * rows)),
                      take(none ? 0 : (size_t)(layout->n_groups * rows) * 2),
                      s.symmetric ? NULL : take(none ? 0 : (size_t)(layout->row_zero_bytes * rows)),
                      rows,
                      cols,
                      s};
    return q;
}

void fill_stored(tape *t, bw_quantized *q, const bw_layout *l) {
    ptrdiff_t rows = l->n_bytes ? q->rows : 0;
    fill_bytes(t, q->codes, l->row_bytes * rows);
    fill_floats(t, q->scales, l->n_groups * rows, BW_F16);
    if (draw(t, 4))
        for (ptrdiff_t i = 0; i < l->n_groups * rows; i++) {
            q->scales[i] &= 0x7fff;
            if (q->scales[i] >= 0x7c00 || !q->scales[i]) q->scales[i] = 0x2c00;
        }
    if (q->zeros) fill_bytes(t, q->zeros, l->row_zero_bytes * rows);
}

void check_stored(const bw_quantized *q) {
    float *out = take((size_t)(q->rows * q->cols) * 4);
    bw_status status = bw_dequantize(q, BW_F32, out);
    if (status == BW_ERR_MEMORY) return; /* made to fail */
    if (status) broken("what was stored reads back");
    for (ptrdiff_t i = 0; i < q->rows * q->cols; i++)
        if (!isfinite(out[i])) broken("what was stored is finite");
}

int refused(bw_status status) {
    return status == BW_ERR_ARGUMENT || status == BW_ERR_SHAPE || status == BW_ERR_OVERFLOW;
}

uint64_t digest(const bw_quantized *q, const bw_layout *l) {
    uint64_t sum = 1469598103934665603u;
    ptrdiff_t rows = l->n_bytes ? q->rows : 0;
    for (ptrdiff_t i = 0; i < l->row_bytes * rows; i++) sum = (sum ^ q->codes[i]) * 1099511628211u;
    for (ptrdiff_t i = 0; i < l->n_groups * rows; i++) sum = (sum ^ q->scales[i]) * 1099511628211u;
    for (ptrdiff_t i = 0; q->zeros && i < l->row_zero_bytes * rows; i++) sum = (sum ^ q->zeros[i]) * 1099511628211u;
    return sum;
}

float *draw_hessian(tape *t, ptrdiff_t n) {
    if (n < 0 || n > 512) return draw_array(t, 0);
    float *h = take((size_t)(n * n) * 4);
    unsigned kind = draw(t, 8);
    if (kind == 7) {
        fill_floats(t, h, n * n, BW_F32);
        return h;
    }
    memset(h, 0, (size_t)(n * n) * 4);
    uint64_t random = (uint64_t)draw(t, 65536) + 3;
    ptrdiff_t samples = kind < 4 ? n + 4 : kind;
    float *x = take((size_t)n * 4);
    for (ptrdiff_t s = 0; s < samples; s++) {
        for (ptrdiff_t i = 0; i < n; i++)
            x[i] = kind == 6 && i % 3 == 0 ? 0.0f : (float)(step_random(&random) >> 40) / 8388608.0f - 1.0f;
        for (ptrdiff_t i = 0; i < n; i++)
            for (ptrdiff_t j = i; j < n; j++) h[i * n + j] += x[i] * x[j];
    }
    for (ptrdiff_t i = 0; i < n; i++)
        for (ptrdiff_t j = 0; j < i; j++) h[i * n + j] = h[j * n + i];
    return h;
}

bw_trellis trellis_room_for(tape *t, ptrdiff_t rows, ptrdiff_t cols, int32_t half_bits, ptrdiff_t *n_bytes) {
    static const int32_t odd[] = {9, 17, 0, -1, INT32_MAX, INT32_MIN};
    int legal = rows >= 0 && rows < 1000 && cols >= 0 && cols < 1000;
    ptrdiff_t down = legal ? (rows + 15) / 16 : 0, across = legal ? (cols + 15) / 16 : 0;
    *n_bytes = down * (half_bits ? bw_trellis_row_bytes(cols, half_bits) : across * 32 * 5);
    return (bw_trellis){take((size_t)*n_bytes),
                        take(legal ? (size_t)rows * 2 : 0),
                        take((size_t)across),
                        rows,
                        cols,
                        draw(t, 32) == 31 ? odd[draw(t, 6)] : 10 + (draw(t, 8) == 7),
                        0};
}

void fill_trellis(tape *t, bw_trellis *stored, ptrdiff_t n_bytes) {
    ptrdiff_t held = n_bytes ? stored->rows : 0;
    fill_bytes(t, stored->codes, n_bytes);
    fill_floats(t, stored->scales, held, BW_F16);
    if (draw(t, 4))
        for (ptrdiff_t i = 0; i < held; i++) stored->scales[i] = (uint16_t)(0x2c00 | (stored->scales[i] & 0xfff));
    for (ptrdiff_t i = 0; held && i < (stored->cols + 15) / 16; i++)
        stored->rates[i] = draw(t, 256) == 255 ? (uint8_t)(6 * draw(t, 2)) : (uint8_t)(1 + draw(t, 5));
}
