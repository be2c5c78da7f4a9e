#include "calls.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/core/bitween.h"
#include "memory.h"

enum { MOST_BYTES = 1 << 22 }; /* of one buffer; what would need more is not called */

typedef struct {
    const uint8_t *at, *end;
} tape;

static unsigned draw(tape *t, unsigned below) {
    unsigned value = 0;
    for (unsigned span = 1; span < below && t->at < t->end; span <<= 8) value = value << 8 | *t->at++;
    return value % below;
}

static uint64_t step(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

static size_t width_of(bw_dtype dtype) {
    return dtype == BW_F32 ? 4 : 2;
}

static void fail(const char *what) {
    fprintf(stderr, "promise broken: %s\n", what);
    abort();
}

/* A size: mostly small, sometimes hostile. */
static ptrdiff_t size(tape *t, unsigned most) {
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

/* n + by, around the end of the numbers too. */
static ptrdiff_t larger(ptrdiff_t n, ptrdiff_t by) {
    return (ptrdiff_t)((size_t)n + (size_t)by);
}

static bw_scheme scheme(tape *t) {
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

static void fill_floats(tape *t, void *memory, ptrdiff_t n, bw_dtype dtype) {
    unsigned kind = draw(t, 8);
    uint64_t random = 0x9e3779b97f4a7c15u ^ ((uint64_t)draw(t, 65536) + 1);
    static const float odd[] = {0.0f, -0.0f, 1e-40f, 1e-30f, 1e30f, 3e38f, NAN, -INFINITY};
    float constant = odd[draw(t, 8)];
    for (ptrdiff_t i = 0; i < n; i++) {
        uint64_t r = step(&random);
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

static void fill_bytes(tape *t, void *memory, ptrdiff_t n) {
    uint64_t random = (uint64_t)draw(t, 65536) + 77;
    for (ptrdiff_t i = 0; i < n; i++) ((uint8_t *)memory)[i] = (uint8_t)(step(&random) >> 24);
}

/* A matrix view over memory that just holds it. Hostile shapes get one element: they must be refused, or be empty. */
static bw_matrix view(tape *t, ptrdiff_t rows, ptrdiff_t cols) {
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

/* A plain array of n floats, exactly; NULL now and then. */
static float *array(tape *t, ptrdiff_t n) {
    if (n < 0 || n > MOST_BYTES / 4) n = 0;
    float *memory = take((size_t)n * 4);
    fill_floats(t, memory, n, BW_F32);
    return draw(t, 64) == 63 ? NULL : memory;
}

/* Room for a stored matrix; too_large when the legal sizes are beyond what a test may take. */
static bw_quantized room(bw_scheme s, ptrdiff_t rows, ptrdiff_t cols, bw_layout *layout, int *too_large) {
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

static void fill_stored(tape *t, bw_quantized *q, const bw_layout *l) {
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

/* What was stored without an error must read back without one, and finite. */
static void check_stored(const bw_quantized *q) {
    float *out = take((size_t)(q->rows * q->cols) * 4);
    bw_status status = bw_dequantize(q, BW_F32, out);
    if (status == BW_ERR_MEMORY) return; /* made to fail */
    if (status) fail("what was stored reads back");
    for (ptrdiff_t i = 0; i < q->rows * q->cols; i++)
        if (!isfinite(out[i])) fail("what was stored is finite");
}

static int refused(bw_status status) {
    return status == BW_ERR_ARGUMENT || status == BW_ERR_SHAPE || status == BW_ERR_OVERFLOW;
}

/* The sum of the bytes of a stored matrix, to see that a refused call has written nothing. */
static uint64_t digest(const bw_quantized *q, const bw_layout *l) {
    uint64_t sum = 1469598103934665603u;
    ptrdiff_t rows = l->n_bytes ? q->rows : 0;
    for (ptrdiff_t i = 0; i < l->row_bytes * rows; i++) sum = (sum ^ q->codes[i]) * 1099511628211u;
    for (ptrdiff_t i = 0; i < l->n_groups * rows; i++) sum = (sum ^ q->scales[i]) * 1099511628211u;
    for (ptrdiff_t i = 0; q->zeros && i < l->row_zero_bytes * rows; i++) sum = (sum ^ q->zeros[i]) * 1099511628211u;
    return sum;
}

/* XT X of a few rows, now and then spoiled. */
static float *hessian(tape *t, ptrdiff_t n) {
    if (n < 0 || n > 512) return array(t, 0);
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
            x[i] = kind == 6 && i % 3 == 0 ? 0.0f : (float)(step(&random) >> 40) / 8388608.0f - 1.0f;
        for (ptrdiff_t i = 0; i < n; i++)
            for (ptrdiff_t j = i; j < n; j++) h[i * n + j] += x[i] * x[j];
    }
    for (ptrdiff_t i = 0; i < n; i++)
        for (ptrdiff_t j = 0; j < i; j++) h[i * n + j] = h[j * n + i];
    return h;
}

static int call_storing(tape *t, int which) {
    ptrdiff_t rows = size(t, 9), cols = size(t, which == 2 ? 150 : 300);
    bw_layout layout;
    int too_large;
    bw_quantized out = room(scheme(t), rows, cols, &layout, &too_large);
    if (too_large) return BW_OK;
    fill_stored(t, &out, &layout);
    ptrdiff_t odd = draw(t, 32) == 31;
    bw_matrix weight = view(t, rows, larger(cols, odd));
    uint64_t before = digest(&out, &layout);
    bw_status status;
    if (which == 0) status = bw_quantize_rtn(&weight, &out);
    else if (which == 1) {
        bw_matrix importance = view(t, rows, cols);
        status = bw_quantize_clip(&weight, draw(t, 2) ? &importance : NULL, &out);
    } else if (which == 2) {
        bw_gptq_options options = {draw(t, 3) * 0.01, 1e-3, (int32_t)draw(t, 4) - 1, (int32_t)draw(t, 2)};
        if (draw(t, 32) == 31) options.damping = draw(t, 2) ? NAN : -1;
        bw_gptq_report report = {0};
        if (rows >= 0 && rows < 1000 && draw(t, 2)) report.row_errors = take((size_t)rows * 8);
        status = bw_quantize_gptq(&weight, hessian(t, cols), &options, &out, &report);
    } else status = bw_encode(&weight, &out);
    if (refused(status) && digest(&out, &layout) != before) fail("a refused call writes nothing");
    if (!status && odd && rows && cols) fail("shapes that do not fit are refused");
    if (!status && layout.n_bytes) check_stored(&out);
    return status;
}

static int call_reading(tape *t, int which) {
    ptrdiff_t rows = size(t, 40), cols = size(t, 300);
    bw_layout layout;
    int too_large;
    bw_quantized stored = room(scheme(t), rows, cols, &layout, &too_large);
    if (too_large) return BW_OK;
    fill_stored(t, &stored, &layout);
    if (layout.n_bytes && draw(t, 2)) {
        bw_matrix weight = view(t, rows, cols);
        if (bw_quantize_rtn(&weight, &stored) == BW_ERR_MEMORY) return BW_ERR_MEMORY;
    }
    if (draw(t, 64) == 63) stored.scales = NULL;
    ptrdiff_t held = layout.n_bytes ? rows : 0;
    bw_dtype dtype = (bw_dtype)draw(t, draw(t, 32) == 31 ? 5 : 3);
    if (which == 0) return bw_dequantize(&stored, dtype, take((size_t)(held * cols) * (held ? width_of(dtype) : 0)));
    ptrdiff_t n = size(t, which == 1 ? 12 : 40), fits = n < 0 || n > 1000 ? 0 : n;
    if (which == 1) {
        int64_t *ids = take((size_t)fits * 8);
        for (ptrdiff_t i = 0; i < fits; i++) ids[i] = draw(t, 16) == 15 ? INT64_MIN + (int64_t)draw(t, 4) : draw(t, 50);
        ptrdiff_t ask = n > 1000 ? PTRDIFF_MAX : n;
        return bw_dequantize_rows(&stored, ids, ask, dtype, take(held ? (size_t)(fits * cols) * width_of(dtype) : 0));
    }
    bw_matrix x = view(t, n, cols), bias = view(t, 1, rows);
    int legal = rows >= 0 && rows < 1000;
    void *out = take(legal ? (size_t)(fits * rows) * width_of(dtype) : 0);
    if ((n > 1000 || !legal) && !cols) return BW_OK; /* legal, and more than a test may take */
    return bw_matmul(&x, &stored, draw(t, 2) ? &bias : NULL, (bw_mode)draw(t, draw(t, 32) == 31 ? 5 : 3), dtype, out);
}

/* Room for trellis codes; none for sizes that are hostile. */
static bw_trellis trellis_room(tape *t, ptrdiff_t rows, ptrdiff_t cols, int32_t half_bits, ptrdiff_t *n_bytes) {
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

static int call_trellis_storing(tape *t, int unused) {
    (void)unused;
    static const int32_t odd_bits[] = {0, 1, 11, -2, INT32_MAX, INT32_MIN};
    ptrdiff_t rows = size(t, 20), cols = size(t, 40), n_bytes;
    bw_trellis_options options = {draw(t, 3) * 0.01,   2 + (int32_t)draw(t, 9), (int32_t)draw(t, 2),
                                  (int32_t)draw(t, 2), (int32_t)draw(t, 2),     draw(t, 16) == 15};
    bw_trellis out = trellis_room(t, rows, cols, options.half_bits, &n_bytes);
    if (draw(t, 32) == 31) options.half_bits = odd_bits[draw(t, 6)];
    if (draw(t, 32) == 31) options.damping = draw(t, 2) ? NAN : -1;
    memset(out.codes, 0x5a, (size_t)n_bytes);
    ptrdiff_t odd = draw(t, 32) == 31;
    bw_matrix weight = view(t, rows, larger(cols, odd));
    float *h = draw(t, 2) ? hessian(t, cols) : NULL, *importance = draw(t, 2) && !h ? array(t, cols) : NULL;
    if (cols > 1000) return BW_OK; /* needs as many rates */
    bw_gptq_report report = {0};
    if (rows >= 0 && rows < 1000 && draw(t, 2)) report.row_errors = take((size_t)rows * 8);
    bw_status status = bw_trellis_quantize(&weight, h, importance, &options, &out, &report);
    for (ptrdiff_t i = 0; refused(status) && i < n_bytes; i++)
        if (out.codes[i] != 0x5a) fail("a refused call writes nothing");
    if (status || !n_bytes) return status;
    if (odd) fail("shapes that do not fit are refused");
    float *values = take((size_t)(rows * cols) * 4);
    bw_status back = bw_trellis_dequantize(&out, 0, rows, BW_F32, values);
    if (back && back != BW_ERR_MEMORY) fail("what was stored reads back");
    for (ptrdiff_t i = 0; !back && i < rows * cols; i++)
        if (!isfinite(values[i])) fail("what was stored is finite");
    return status;
}

static int call_trellis_reading(tape *t, int multiply) {
    int turned = draw(t, 8) == 7;
    ptrdiff_t rows = turned ? 128 : size(t, 40), cols = turned ? 128 + 128 * (ptrdiff_t)draw(t, 2) : size(t, 150),
              n_bytes;
    bw_trellis stored = trellis_room(t, rows, cols, 0, &n_bytes);
    stored.turned = turned || draw(t, 32) == 31; /* of other shapes, it is refused */
    if (turned && draw(t, 8)) stored.width = 16;
    ptrdiff_t held = n_bytes ? rows : 0;
    fill_bytes(t, stored.codes, n_bytes);
    fill_floats(t, stored.scales, held, BW_F16);
    if (draw(t, 4))
        for (ptrdiff_t i = 0; i < held; i++) stored.scales[i] = (uint16_t)(0x2c00 | (stored.scales[i] & 0xfff));
    for (ptrdiff_t i = 0; held && i < (cols + 15) / 16; i++)
        stored.rates[i] = draw(t, 256) == 255 ? (uint8_t)(6 * draw(t, 2)) : (uint8_t)(1 + draw(t, 5));
    for (ptrdiff_t i = 1; turned && i < cols / 16 && draw(t, 64); i++) stored.rates[i] = stored.rates[0];
    if (rows > 1000 || cols > 1000) stored.rates = NULL; /* would need as many */
    if (draw(t, 64) == 63) stored.scales = NULL;
    bw_dtype dtype = (bw_dtype)draw(t, draw(t, 32) == 31 ? 5 : 3);
    ptrdiff_t n = size(t, 40), fits = n < 0 || n > 1000 ? 0 : n;
    if (!multiply) {
        ptrdiff_t first = size(t, 40);
        return bw_trellis_dequantize(&stored, first, n, dtype, take((size_t)(fits * (held ? cols : 0)) * 4));
    }
    bw_matrix x = view(t, n, cols), bias = view(t, 1, rows);
    void *out = take(rows >= 0 && rows < 1000 ? (size_t)(fits * rows) * width_of(dtype) : 0);
    if ((n > 1000 || rows > 1000) && !cols) return BW_OK; /* legal, and more than a test may take */
    return bw_trellis_matmul(&x, &stored, draw(t, 2) ? &bias : NULL, (bw_mode)draw(t, draw(t, 32) == 31 ? 5 : 3), dtype,
                             out);
}

static int call_loss(tape *t, int which) {
    ptrdiff_t rows = size(t, 12), cols = size(t, 400), fits = rows < 0 || rows > 1000 ? 0 : rows;
    bw_matrix logits = view(t, rows, cols);
    if (which == 2) {
        double sum = 0;
        return bw_total(&logits, &sum);
    }
    float *out = take((size_t)fits * 4);
    if (which == 1) {
        bw_matrix reference = view(t, rows, larger(cols, draw(t, 32) == 31));
        return bw_kl_divergence(&reference, &logits, out);
    }
    int64_t *targets = take((size_t)fits * 8);
    for (ptrdiff_t i = 0; i < fits; i++) targets[i] = (int64_t)draw(t, 420) - (draw(t, 32) == 31 ? 30 : 0);
    if (rows > 1000) return BW_OK; /* needs as many targets */
    bw_status status = bw_cross_entropy(&logits, targets, out);
    for (ptrdiff_t i = 0; i < fits && !status; i++)
        if (targets[i] < 0 || targets[i] >= cols) fail("targets outside are refused");
    return status;
}

static int call_search(tape *t, int unused) {
    (void)unused;
    ptrdiff_t rows = size(t, 6), cols = size(t, 200);
    bw_matrix weight = view(t, rows, cols), importance = view(t, rows, cols);
    bw_scheme schemes[6];
    ptrdiff_t n = draw(t, 7);
    for (ptrdiff_t i = 0; i < n; i++) schemes[i] = scheme(t);
    double *out = take((size_t)n * 8), *by_row = NULL;
    if (rows >= 0 && rows < 100 && draw(t, 2)) {
        by_row = take((size_t)rows * 8);
        for (ptrdiff_t i = 0; i < rows; i++) by_row[i] = draw(t, 32) == 31 ? -1.0 : draw(t, 5) * 0.5;
    }
    bw_status status = bw_search(&weight, schemes, n, draw(t, 2) ? &importance : NULL, by_row, (int)draw(t, 2), out);
    for (ptrdiff_t i = 0; i < n && !status; i++)
        if (!(out[i] >= 0)) fail("errors are numbers of at least zero");
    return status;
}

static int call_hessian(tape *t, int unused) {
    (void)unused;
    ptrdiff_t tokens = size(t, 20), cols = size(t, 70), other = size(t, 70);
    int cross = (int)draw(t, 2);
    bw_matrix x = view(t, tokens, cols), y = view(t, larger(tokens, draw(t, 32) == 31), other);
    ptrdiff_t across = cross ? other : cols, n;
    if (cols < 0 || across < 0 || __builtin_mul_overflow(cols, across, &n) || n > MOST_BYTES / 4) n = 0;
    float *h = take((size_t)n * 4), *weights = tokens >= 0 && tokens < 1000 ? array(t, tokens) : NULL;
    memset(h, 0, (size_t)n * 4);
    if (n == 0 && (cols > 1000 || across > 1000) && cols && across) h = NULL; /* needs more than a test may take */
    return bw_hessian_add(&x, cross ? &y : NULL, draw(t, 2) ? weights : NULL, h);
}

static int call_align(tape *t, int unused) {
    (void)unused;
    ptrdiff_t rows = size(t, 9), cols = size(t, 90);
    bw_matrix weight = view(t, rows, cols);
    float *h = hessian(t, cols), *c = hessian(t, cols);
    double damping = draw(t, 4) * 0.05, share = draw(t, 5) * 0.25;
    if (draw(t, 32) == 31) share = draw(t, 2) ? NAN : 2;
    ptrdiff_t n;
    if (rows < 0 || cols < 0 || __builtin_mul_overflow(rows, cols, &n) || n > MOST_BYTES / 4) n = 0;
    return bw_align(&weight, h, c, share, &damping, take((size_t)n * 4));
}

static int call_rounding(tape *t, int backward) {
    ptrdiff_t rows = size(t, 9), cols = size(t, 200), n = 0, groups = 0;
    bw_scheme s = scheme(t);
    bw_layout layout = {0};
    bw_status legal = bw_scheme_layout(&s, rows, cols, &layout);
    if (!legal) {
        if (layout.n_bytes > MOST_BYTES / 8) return BW_OK;
        n = rows * cols;
        groups = rows * layout.n_groups;
    }
    float *low = array(t, groups), *high = array(t, groups);
    bw_rounding r = {array(t, n), array(t, n), s.symmetric ? NULL : low, high, rows, cols, s};
    if (!backward) return bw_train_forward(&r, array(t, n));
    float *into_low = s.symmetric ? NULL : array(t, groups);
    return bw_train_backward(&r, array(t, n), array(t, n), into_low, array(t, groups));
}

static int call_pack(tape *t, int unpack) {
    ptrdiff_t rows = size(t, 9), cols = size(t, 300);
    bw_scheme s = scheme(t);
    s.symmetric = 1, s.group_size = -1; /* of no concern to packing */
    bw_layout layout = {0};
    bw_status legal = bw_scheme_layout(&s, rows, cols, &layout);
    if (!legal && layout.n_bytes > MOST_BYTES) return BW_OK;
    size_t wide = legal ? 0 : (size_t)(rows * cols), narrow = legal ? 0 : (size_t)(rows * layout.row_bytes);
    uint8_t *codes = take(wide), *packed = take(narrow);
    fill_bytes(t, codes, (ptrdiff_t)wide);
    fill_bytes(t, packed, (ptrdiff_t)narrow);
    if (draw(t, 4))
        for (size_t i = 0; i < wide && s.levels > 0; i++) codes[i] = (uint8_t)(codes[i] % s.levels);
    if (unpack) return bw_unpack(packed, rows, cols, s.levels, codes);
    bw_status status = bw_pack(codes, rows, cols, s.levels, packed);
    if (!status && wide) {
        uint8_t *again = take(wide);
        bw_status back = bw_unpack(packed, rows, cols, s.levels, again);
        if (back != BW_ERR_MEMORY && (back || memcmp(codes, again, wide))) fail("packed codes come back");
    }
    return status;
}

static int call_layout(tape *t, int unused) {
    (void)unused;
    bw_scheme s = scheme(t);
    bw_layout layout;
    ptrdiff_t rows = size(t, 1000), cols = size(t, 1000);
    bw_status status = bw_scheme_layout(&s, rows, cols, &layout);
    if (!status && (layout.n_bytes < 0 || layout.row_bytes < 0 || layout.n_groups < 0)) fail("sizes are not negative");
    return status;
}

static int call_mirror(tape *t, int unused) {
    (void)unused;
    ptrdiff_t side = size(t, 90);
    float *h = array(t, side < 0 || side > 1000 ? 0 : side * side);
    return side > 1000 && side < (ptrdiff_t)1 << 33 ? BW_OK : bw_mirror_upper(side, h);
}

static const struct {
    const char *name;
    int (*call)(tape *, int which);
    int which;
} calls[N_CALLS] = {{"scheme_layout", call_layout, 0},
                    {"quantize_rtn", call_storing, 0},
                    {"quantize_clip", call_storing, 1},
                    {"quantize_gptq", call_storing, 2},
                    {"encode", call_storing, 3},
                    {"dequantize", call_reading, 0},
                    {"dequantize_rows", call_reading, 1},
                    {"matmul", call_reading, 2},
                    {"cross_entropy", call_loss, 0},
                    {"kl_divergence", call_loss, 1},
                    {"total", call_loss, 2},
                    {"trellis_quantize", call_trellis_storing, 0},
                    {"trellis_dequantize", call_trellis_reading, 0},
                    {"trellis_matmul", call_trellis_reading, 1},
                    {"search", call_search, 0},
                    {"hessian_add", call_hessian, 0},
                    {"mirror_upper", call_mirror, 0},
                    {"align", call_align, 0},
                    {"train_forward", call_rounding, 0},
                    {"train_backward", call_rounding, 1},
                    {"pack", call_pack, 0},
                    {"unpack", call_pack, 1}};

int call_from_bytes(const uint8_t *bytes, size_t n, const char **named) {
    tape t = {bytes, bytes + n};
    unsigned which = draw(&t, N_CALLS);
    *named = calls[which].name;
    int status = calls[which].call(&t, calls[which].which);
    release_all();
    return status;
}

void make_up(uint64_t *random, uint8_t *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) bytes[i] = (uint8_t)(step(random) >> 29);
}

uint64_t first_random(const char *seed) {
    return strtoull(seed, NULL, 10) * 0x9e3779b97f4a7c15u + 1;
}
